"""Suite of prefill attention: t causal queries over t keys.

The rivals get a q that is already rotated, so their rotation is not timed; gemma_fast rotates q
inside the op. This favors the rivals. FlexAttention is torch.compile's attention; its tuning takes
up to a minute per size. The soft cap is 5, because random scores do not reach Gemma 2's soft cap
of 50.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from gemma_fast.benchmarks.kernels.rivals import SDPA, by_pointers, compiled, plain, sdpa
from gemma_fast.benchmarks.kernels.rotary import TOKENS, Tensors, angles, norm_and_rotate
from gemma_fast.benchmarks.kernels.suite import Call, Check, Choices, Prepare, Size, Suite, Tuning
from gemma_fast.benchmarks.measure.machine import Work, visible_pairs
from gemma_fast.benchmarks.measure.outcome import EAGER, OURS, OURS_BY_POINTERS
from gemma_fast.kernels import attention as module
from gemma_fast.kernels.rotary import rotate

Options = dict[str, Any]  # the op's keywords: scale, window, softcap


def inputs(
    t: int, heads: int, n: int, d: int, window: int | None = None, softcap: float | None = None,
    norm: bool = False, **make: Any,
) -> Tensors:  # fmt: skip
    """Returns q :: [1, t, heads, d], not rotated; keys, values :: [1, n, t, d]; cos, sin;
    query_offset; norm_weight or None; options."""
    q = torch.randn(1, t, heads, d, **make)
    keys, values = torch.randn(2, 1, n, t, d, **make)
    query_offset = torch.zeros(1, dtype=torch.int32, device=make["device"])
    norm_weight = torch.randn(d, **make) / 4 if norm else None
    options = {"scale": d**-0.5, "window": window, "softcap": softcap}
    return q, keys, values, *angles(t, d, make["device"]), query_offset, norm_weight, options


def work(
    itemsize: int, t: int, heads: int, n: int, d: int,
    window: int | None = None, softcap: float | None = None,
) -> Work:  # fmt: skip
    """Counts 4 FLOPs per channel, query head and visible (query, key) pair. Counts the bytes read
    (q, keys, values, cos, sin) and the bytes written (the output)."""
    values = 2 * t * heads * d + 2 * t * n * d
    return Work(values * itemsize + t * d * 4, 4 * heads * d * visible_pairs(t, window))


def with_options(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*inputs: Any) -> Tensor:
        *tensors, options = inputs
        return op(*tensors, **options)

    return call


def attend(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, options: Options) -> Tensor:
    """Computes attention :: [b, t, heads, d] as reference.py does: matmuls in the inputs' dtype,
    softmax in fp32 (or fp64 if the inputs are fp64).

    q :: [b, t, heads, d], rotated; keys, values :: [b, n, s, d]; hidden :: [t, s] or [b, 1, t, s],
    True where a query must not see a key
    """
    keys, values = (x.repeat_interleave(q.shape[2] // x.shape[1], dim=1) for x in (keys, values))
    scores = q.transpose(1, 2) @ keys.mT * options["scale"]  # [b, heads, t, s]
    if softcap := options["softcap"]:
        scores = softcap * torch.tanh(scores / softcap)
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1, dtype=wide).to(q.dtype)
    return (weights @ values).transpose(1, 2)


def hidden_keys(t: int, window: int | None, device: torch.device) -> Tensor:
    """Returns a mask :: [t, t], True for keys after the query or before the query's window."""
    i = torch.arange(t, device=device)
    distance = i[:, None] - i
    return (distance < 0) | (distance >= (window or t))


def formula(*given: Any) -> Tensor:
    q, keys, values, cos, sin, _, weight, options = given
    hidden = hidden_keys(q.shape[1], options["window"], q.device)
    return attend(norm_and_rotate(q, weight, cos, sin), keys, values, hidden, options)


def rotated(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotate(q, cos, sin).to(q.dtype)


def rival(prepare: Callable[[Tensor, Tensor, Tensor, Options], Call]) -> Prepare:
    """Returns a provider that calls `prepare` with q :: [1, t, heads, d], rotated; keys, values ::
    [1, n, t, d]; options."""

    def given(*inputs: Any) -> Call:
        q, keys, values, cos, sin, _, _, options = inputs
        return prepare(rotated(q, cos, sin), keys, values, options)

    return given


def eager(q: Tensor, keys: Tensor, values: Tensor, options: Options) -> Call:
    hidden = hidden_keys(q.shape[1], options["window"], q.device)
    return lambda: attend(q, keys, values, hidden, options)


def by_sdpa(backend: SDPBackend) -> Prepare:
    def prepare(q: Tensor, keys: Tensor, values: Tensor, options: Options) -> Call:
        if options["softcap"] or options["window"]:
            raise NotImplementedError("no soft cap" if options["softcap"] else "no window")
        keywords = {"is_causal": True, "scale": options["scale"]}
        call = sdpa(backend, q.transpose(1, 2), keys, values, **keywords)
        return lambda: call().transpose(1, 2)

    return rival(prepare)


@cache  # all sets of inputs share the functions, because Dynamo compiles again for new functions
def flex_masks(t: int, window: Any, softcap: Any, device: torch.device) -> dict[str, Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    def causal(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query

    def windowed(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key > query - window)

    def cap(score: Tensor, b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    mask = create_block_mask(windowed if window else causal, None, None, t, t, device=device)
    return {"block_mask": mask, "score_mod": cap if softcap else None}


def flex_attention(q: Tensor, keys: Tensor, values: Tensor, options: Options) -> Call:
    from torch.nn.attention import flex_attention as flex

    masks = flex_masks(q.shape[1], options["window"], options["softcap"], q.device)
    q = q.transpose(1, 2)  # [1, heads, t, d]
    run = compiled(flex.flex_attention)
    # Both are true: each query sees at least one key, and the keys that it sees are adjacent.
    safe = {"ROWS_GUARANTEED_SAFE": True, "BLOCKS_ARE_CONTIGUOUS": True}
    keywords = {"scale": options["scale"], "enable_gqa": True, "kernel_options": safe, **masks}
    return lambda: run(q, keys, values, **keywords).transpose(1, 2)


def flash_attn_4(q: Tensor, keys: Tensor, values: Tensor, options: Options) -> Call:
    from flash_attn.cute import flash_attn_func

    keys, values = (x.transpose(1, 2).contiguous() for x in (keys, values))  # [1, t, n, d]
    window = options["window"]
    keywords = {
        "softmax_scale": options["scale"], "causal": True, "softcap": options["softcap"] or 0.0,
        "window_size": (window - 1, 0) if window else (None, None),
    }  # fmt: skip
    return lambda: flash_attn_func(q, keys, values, **keywords)[0]


def flashinfer_attention(q: Tensor, keys: Tensor, values: Tensor, options: Options) -> Call:
    from flashinfer import single_prefill_with_kv_cache

    keys, values = (x[0].transpose(0, 1).contiguous() for x in (keys, values))  # [t, n, d]
    keywords = {
        "causal": True, "kv_layout": "NHD", "sm_scale": options["scale"],
        "window_left": (options["window"] or 0) - 1, "logits_soft_cap": options["softcap"],
    }  # fmt: skip
    return lambda: single_prefill_with_kv_cache(q[0], keys, values, **keywords).unsqueeze(0)


def choices(size: Size) -> Choices:
    keys = (16, 32) if size["d"] > 256 else (32, 64) if size["d"] > 128 else (64, 128)
    return {"BLOCK_M": (64, 128), "BLOCK_N": keys, "num_warps": (4, 8), "num_stages": (2, 3)}


def named_sizes(names: Sequence[str], *rows: tuple[int, ...]) -> dict[str, Size]:
    """Returns name → size. Each row has the values of the keywords `names`, or of the first few.

    The name of a size is, for example, "t 24, 4/1 heads, d 32": 4 query heads and 1 kv head.
    """
    sizes = [dict(zip(names, row, strict=False)) for row in rows]

    def word(size: Size, name: str) -> str:
        return f"{size[name]}/{size['n']} heads" if name == "heads" else f"{name} {size[name]}"

    return {", ".join(word(x, name) for name in x if name != "n"): x for x in sizes}


NAMES = "t", "heads", "n", "d", "window", "softcap"
ATTENTION = Suite(
    name="attention",
    about="Causal attention of a prompt of t tokens; query/kv heads; rivals get a rotated q",
    sizes=named_sizes(
        NAMES,
        *((t, 8, 1, 256) for t in (512, 2048, 8192, 16384)),
        (8192, 16, 16, 256),
        (8192, 32, 16, 128, 4096, 5),
        (8192, 4, 1, 256, 512),
        (8192, 8, 1, 512),
    ),
    tiny=named_sizes(NAMES, (24, 4, 1, 32), (24, 4, 2, 32, 8), (24, 4, 2, 32, 8, 5)),
    inputs=inputs,
    oracle=with_options(module.attention_reference),
    work=work,
    # In bf16, eager PyTorch's error is 6.7e-3, because it rounds scores before the soft cap and the
    # softmax. A window that is wrong by one token gives an error of 1.4e-2.
    tolerance={torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5},
    tuning=Tuning("attention", choices),
    providers={
        EAGER: rival(eager),
        **{name: by_sdpa(backend) for name, backend in SDPA.items()},
        "FlexAttention": rival(flex_attention),
        "flash-attn-4": rival(flash_attn_4),
        "flashinfer": rival(flashinfer_attention),
        OURS_BY_POINTERS: by_pointers("attention", plain(with_options(module.attention))),
        OURS: plain(with_options(module.attention)),
    },
)
ALL = {"window": 29, "softcap": 5.0, "norm": True}
CAUSAL = Check(
    "attention", inputs, formula, ATTENTION.providers[OURS],
    [size | {"heads": 2 * size["n"]} for size in TOKENS],
)  # fmt: skip
CHECKS = (CAUSAL, CAUSAL.resized("attention, window, cap, norm", **ALL))
