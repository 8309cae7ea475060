"""Prefill attention: t causal queries over the t keys that were just written.

The rivals are given q rotated, which is preparation and not timed; gemma_fast rotates it inside the
op. That errs against gemma_fast. torch.compile's way to do attention is FlexAttention, which takes
up to a minute a size to tune. The soft cap is not Gemma 2's 50, which random scores do not reach.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gemma_fast.benchmarks.kernels.rotary import Tensors, angles
from gemma_fast.benchmarks.kernels.suite import (
    EAGER,
    OURS,
    OURS_BY_POINTERS,
    Call,
    Suite,
    by_pointers,
    compiled,
)
from gemma_fast.benchmarks.measure.machine import Work
from gemma_fast.kernels.attention import attention, attention_reference
from gemma_fast.kernels.rotary import rotate


def inputs(
    device: torch.device, dtype: torch.dtype, t: int, heads: int, n: int, d: int,
    window: int | None = None, softcap: float | None = None,
) -> Tensors:  # fmt: skip
    """q :: [1, t, heads, d], not rotated; keys, values :: [1, n, t, d]; … ; the op's keywords."""
    make: dict[str, Any] = {"device": device, "dtype": dtype}
    q = torch.randn(1, t, heads, d, **make)
    keys, values = torch.randn(2, 1, n, t, d, **make)
    start = torch.zeros(1, dtype=torch.int32, device=device)
    options = {"scale": d**-0.5, "window": window, "softcap": softcap}
    return q, keys, values, *angles(t, d, device), start, options


def visible_pairs(t: int, window: int | None) -> int:
    """Σ min(i, window) for i from 1 to t: the keys that each query sees."""
    w = min(t, window or t)
    return w * (w + 1) // 2 + (t - w) * w


def work(
    itemsize: int, t: int, heads: int, n: int, d: int,
    window: int | None = None, softcap: float | None = None,
) -> Work:  # fmt: skip
    """4 FLOPs a channel, head and visible pair; q, keys, values, cos and sin read, out written."""
    values = 2 * t * heads * d + 2 * t * n * d
    return Work(values * itemsize + t * d * 4, 4 * heads * d * visible_pairs(t, window))


def ours(op: Callable[..., Tensor]) -> Callable[..., Call]:
    def provider(*inputs: Any) -> Call:
        *tensors, options = inputs
        return lambda: op(*tensors, **options)

    return provider


def rotated(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotate(q, cos, sin).to(q.dtype)


def eager(
    q: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, start: Tensor,
    options: dict[str, Any],
) -> Call:  # fmt: skip
    """Products in the inputs' dtype, softmax in fp32, as in reference.py."""
    t, group = q.shape[1], q.shape[2] // keys.shape[1]
    q = rotated(q, cos, sin).transpose(1, 2)  # [1, heads, t, d]
    i = torch.arange(t, device=q.device)
    hidden = i > i[:, None]
    if window := options["window"]:
        hidden |= i <= i[:, None] - window

    def call() -> Tensor:
        k, v = (x.repeat_interleave(group, dim=1) for x in (keys, values))
        scores = q @ k.mT * options["scale"]
        if softcap := options["softcap"]:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.float32)
        return (weights.to(q.dtype) @ v).transpose(1, 2)

    return call


def sdpa(backend: SDPBackend) -> Callable[..., Call]:
    def provider(
        q: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, start: Tensor,
        options: dict[str, Any],
    ) -> Call:  # fmt: skip
        if options["softcap"] or options["window"]:
            raise NotImplementedError("no soft cap" if options["softcap"] else "no window")
        q = rotated(q, cos, sin).transpose(1, 2)  # [1, heads, t, d]
        if backend == SDPBackend.EFFICIENT_ATTENTION:  # knows only one kv head for each query head
            group = q.shape[1] // keys.shape[1]
            keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
        grouped = q.shape[1] != keys.shape[1]

        def call() -> Tensor:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(
                    q, keys, values, is_causal=True, scale=options["scale"], enable_gqa=grouped
                )
            return out.transpose(1, 2)

        try:
            call()
        except RuntimeError as error:
            if "No available kernel" not in str(error) and "No viable backend" not in str(error):
                raise
            raise NotImplementedError("no kernel of this backend") from error
        return call

    return provider


@cache  # one for all sets of inputs: Dynamo compiles again for another function
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


def flex_attention(
    q: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, start: Tensor,
    options: dict[str, Any],
) -> Call:  # fmt: skip
    from torch.nn.attention import flex_attention as flex

    masks = flex_masks(q.shape[1], options["window"], options["softcap"], q.device)
    q = rotated(q, cos, sin).transpose(1, 2)
    run = compiled(flex.flex_attention)
    safe = {"ROWS_GUARANTEED_SAFE": True, "BLOCKS_ARE_CONTIGUOUS": True}  # no row sees nothing
    keywords = {"scale": options["scale"], "enable_gqa": True, "kernel_options": safe, **masks}
    return lambda: run(q, keys, values, **keywords).transpose(1, 2)


def flash_attn_4(
    q: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, start: Tensor,
    options: dict[str, Any],
) -> Call:  # fmt: skip
    from flash_attn.cute import flash_attn_func

    q = rotated(q, cos, sin)
    keys, values = (x.transpose(1, 2).contiguous() for x in (keys, values))  # [1, t, n, d]
    window = options["window"]
    keywords = {
        "softmax_scale": options["scale"], "causal": True, "softcap": options["softcap"] or 0.0,
        "window_size": (window - 1, 0) if window else (None, None),
    }  # fmt: skip
    return lambda: flash_attn_func(q, keys, values, **keywords)[0]


def flashinfer_attention(
    q: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, start: Tensor,
    options: dict[str, Any],
) -> Call:  # fmt: skip
    from flashinfer import single_prefill_with_kv_cache

    q = rotated(q, cos, sin)[0]
    keys, values = (x[0].transpose(0, 1).contiguous() for x in (keys, values))  # [t, n, d]
    keywords = {
        "causal": True, "kv_layout": "NHD", "sm_scale": options["scale"],
        "window_left": (options["window"] or 0) - 1, "logits_soft_cap": options["softcap"],
    }  # fmt: skip
    return lambda: single_prefill_with_kv_cache(q, keys, values, **keywords).unsqueeze(0)


def _sizes(*rows: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    names = ("t", "heads", "n", "d", "window", "softcap")
    sizes = [dict(zip(names, row, strict=False)) for row in rows]
    return {
        f"t {x['t']}, {x['heads']}/{x['n']} heads, d {x['d']}"
        + "".join(f", {name} {x[name]}" for name in ("window", "softcap") if name in x): x
        for x in sizes
    }


ATTENTION = Suite(
    name="attention",
    about="Causal attention of a prompt of t tokens; query / kv heads. Rivals get q rotated",
    yardstick=False,
    sizes=_sizes(
        *((t, 8, 1, 256) for t in (512, 2048, 8192, 16384)),
        (8192, 16, 16, 256),
        (8192, 32, 16, 128, 4096, 5),
        (8192, 4, 1, 256, 512),
    ),
    tiny=_sizes((24, 4, 1, 32), (24, 4, 2, 32, 8), (24, 4, 2, 32, 8, 5)),
    inputs=inputs,
    oracle=lambda *inputs: ours(attention_reference)(*inputs)(),
    work=work,
    # Scores rounded before the soft cap and the softmax, as in eager: 6.7e-3. A window off by one:
    # 1.4e-2.
    tolerance={torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5},
    providers={
        EAGER: eager,
        "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
        "SDPA efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
        "FlexAttention": flex_attention,
        "flash-attn-4": flash_attn_4,
        "flashinfer": flashinfer_attention,
        OURS_BY_POINTERS: by_pointers(ours(attention)),
        OURS: ours(attention),
    },
)
