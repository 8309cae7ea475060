"""Suite of decode attention: one new token per sequence, whose K and V are written to the cache.

eager, torch.compile and gemma_fast do the rotation, the cache write and the attention. The other
rivals do only the attention: they get a rotated q, and a cache that already contains the new token.
The rotation and the write are not timed, which favors these rivals. Every slot of the ring is
visible, so no provider needs a mask.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from gemma_fast.benchmarks.kernels.attention import ALL, attend, named_sizes, rotated, with_options
from gemma_fast.benchmarks.kernels.rivals import SDPA, plain, sdpa, torch_compiled
from gemma_fast.benchmarks.kernels.rotary import Tensors, angles, norm_and_rotate
from gemma_fast.benchmarks.kernels.suite import Call, Check, Prepare, Suite, Tuning
from gemma_fast.benchmarks.measure.machine import Work
from gemma_fast.benchmarks.measure.outcome import EAGER, OURS, OURS_ALONE
from gemma_fast.kernels import decode_attention as module
from gemma_fast.kernels.attention import attention
from gemma_fast.kernels.rotary import rotary_write_reference


def inputs(
    b: int, depth: int, heads: int, n: int, d: int, window: int | None = None,
    softcap: float | None = None, norm: bool = False, **make: Any,
) -> Tensors:  # fmt: skip
    """Returns qkv :: [b, heads + 2 * n, d]; keys, values :: [b, n, slots, d]; cos, sin; position ::
    [b]; the norm weights of q and k, or None; options.

    keys and values are a ring of min(depth, window) slots. The new token, at position depth − 1,
    is not written to it yet.
    """
    qkv = torch.randn(b, heads + 2 * n, d, **make)
    keys, values = torch.randn(2, b, n, min(depth, window or depth), d, **make)
    cos, sin = tables(depth, d, make["device"])
    position = torch.full((b,), depth - 1, dtype=torch.int32, device=make["device"])
    norms = [torch.randn(d, **make) / 4 if norm else None for _ in "qk"]
    return qkv, keys, values, cos, sin, position, *norms, {"scale": d**-0.5, "softcap": softcap}


@cache
def tables(depth: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns cos, sin :: [depth, d / 2]. All sets of inputs share them, as a model's layers do."""
    cos, sin = angles(depth, d, device)
    return cos[0], sin[0]


def work(
    itemsize: int, b: int, depth: int, heads: int, n: int, d: int, window: int | None = None
) -> Work:
    """Counts the bytes read (old K and V, qkv, cos, sin), the bytes written (new K and V, output),
    and 4 FLOPs per channel, query head and visible key."""
    visible = min(depth, window or depth)
    cache = 2 * b * n * visible * d  # K and V: the newest is written, the others are read
    values = cache + b * (heads + 2 * n) * d + b * heads * d
    return Work(values * itemsize + 4 * d, 4 * b * heads * d * visible)


def ours(*inputs: Any, pdl: bool = True) -> Call:
    qkv, keys, values, cos, sin, position, q_norm, k_norm, options = inputs
    counter = zero_counter(keys)
    return lambda: module.decode_attention(
        qkv, keys, values, cos, sin, position, counter, q_norm, k_norm, **options, pdl=pdl
    )


def zero_counter(keys: Tensor) -> Tensor:
    return torch.zeros(keys[..., 0, 0].numel(), dtype=torch.int32, device=keys.device)


def at_position(
    qkv: Tensor, keys: Tensor, cos: Tensor, sin: Tensor, position: Tensor
) -> tuple[Tensor, ...]:
    """Returns q :: [b, 1, heads, d]; k, v :: [b, 1, n, d]; cos, sin :: [b, 1, d / 2] for each
    sequence's position."""
    n = keys.shape[1]
    q, k, v = qkv.unsqueeze(1).split((qkv.shape[1] - 2 * n, n, n), dim=2)
    return q, k, v, *(x[position.long()].unsqueeze(1) for x in (cos, sin))


def written(
    qkv: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, position: Tensor
) -> Tensor:
    """Rotates q and k. Writes k and v to the cache. Returns the rotated q :: [b, heads, 1, d]."""
    q, k, v, cos, sin = at_position(qkv, keys, cos, sin, position)
    rotary_write_reference(k, v, keys, values, cos, sin, position)
    return rotated(q, cos, sin).transpose(1, 2)


def eager(*inputs: Any) -> Tensor:
    """Writes K and V to the cache, then computes attention :: [b, heads, d] as reference.py does:
    matmuls in the inputs' dtype, softmax in fp32."""
    *tensors, _, _, options = inputs
    q, keys, values = written(*tensors), *tensors[1:3]
    b, heads, _, d = q.shape
    q = q.reshape(b, keys.shape[1], -1, d)  # [b, n, m, d]
    weights = (q @ keys.mT * options["scale"]).softmax(-1, dtype=torch.float32)
    return (weights.to(q.dtype) @ values).view(b, heads, d)


def by_sdpa(backend: SDPBackend) -> Prepare:
    def prepare(*inputs: Any) -> Call:
        *tensors, _, _, options = inputs
        call = sdpa(backend, written(*tensors), *tensors[1:3], scale=options["scale"])
        return lambda: call().squeeze(2)

    return prepare


def formula(*given: Any) -> Tensor:
    """Computes decode attention for a full ring, with all sequences at the same position."""
    qkv, keys, values, cos, sin, position, q_weight, k_weight, options = given
    q, k, v, cos, sin = at_position(qkv, keys, cos, sin, position)
    q, k = norm_and_rotate(q, q_weight, cos, sin), norm_and_rotate(k, k_weight, cos, sin)
    slot = int(position[0]) % keys.shape[2]
    keys[:, :, slot], values[:, :, slot] = k.squeeze(1), v.squeeze(1)
    hidden = torch.zeros(1, keys.shape[2], dtype=torch.bool, device=q.device)
    return attend(q, keys, values, hidden, options).squeeze(1)


def padded_inputs(
    t: int, past: int, n: int, d: int, window: int | None = None, softcap: float | None = None,
    **make: Any,
) -> Tensors:  # fmt: skip
    """Returns q :: [2, t, 2 * n, d], rotated; keys, values :: [2, n, past + t, d]; query_offset,
    left_padding :: [2]; options. The queries come after `past` keys. The second sequence has left
    padding."""
    keys, values = torch.randn(2, 2, n, past + t, d, **make)
    bounds = torch.tensor([[past, past], [0, past // 3]], device=make["device"], dtype=torch.int32)
    options = {"scale": d**-0.5, "window": window, "softcap": softcap}
    return torch.randn(2, t, 2 * n, d, **make), keys, values, *bounds, options


def padded_formula(*given: Any) -> Tensor:
    """Computes attention for rotated q and keys. A sequence does not see the keys before its
    `left_padding`."""
    q, keys, values, query_offset, left_padding, options = given
    query = query_offset[:, None] + torch.arange(q.shape[1], device=q.device)
    distance = query[:, :, None] - torch.arange(keys.shape[2], device=q.device)  # [b, t, s]
    hidden = (distance < 0) | (distance > (query - left_padding[:, None])[:, :, None])
    if window := options["window"]:
        hidden |= distance >= window
    return attend(q, keys, values, hidden.unsqueeze(1), options)


def padded_prompt(*given: Any) -> Call:
    q, keys, values, query_offset, left_padding, options = given
    return lambda: attention(
        q, keys, values, None, None, query_offset, left_padding=left_padding, **options
    )


def padded_token(*given: Any) -> Call:
    q, keys, values, query_offset, left_padding, options = given
    counter = zero_counter(keys)
    return lambda: module.split_attention(
        q[:, 0], keys, values, query_offset, left_padding, counter, **options
    ).unsqueeze(1)


CHOICES = {
    "BLOCK_N": (16, 32, 64), "MERGE_COST": (2, 4, 8, 16), "num_warps": (4, 8), "num_stages": (2, 3),
}  # fmt: skip
NAMES = "b", "depth", "heads", "n", "d", "window"
DECODE_ATTENTION = Suite(
    name="decode_attention",
    about="Attention of one token over `depth` keys; query/kv heads; SDPA does only the attention",
    sizes=named_sizes(
        NAMES,
        *((b, depth, 8, 1, 256) for b, depth in ((1, 2048), (1, 8192), (64, 4096))),
        (1, 8192, 4, 1, 256, 512),
        (1, 8192, 8, 1, 512),
        (1, 8192, 16, 1, 512),
    ),
    tiny=named_sizes(NAMES, (1, 40, 4, 1, 32), (2, 24, 4, 2, 32), (1, 24, 4, 1, 32, 16)),
    inputs=inputs,
    oracle=with_options(module.decode_attention_reference),
    work=work,
    tolerance={torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5},
    tuning=Tuning("decode_attention", lambda size: CHOICES),
    providers={
        EAGER: plain(eager),
        "torch.compile": torch_compiled(eager),
        **{name: by_sdpa(backend) for name, backend in SDPA.items()},
        OURS_ALONE: partial(ours, pdl=False),
        OURS: ours,
    },
)
LATER = (
    {"t": 20, "past": 150, "n": 2, "d": 32},
    {"t": 500, "past": 3000, "n": 4, "d": 256, "window": 1024},
)
TOKEN = Check("decode_attention", inputs, formula, ours, (
    {"b": 2, "depth": 150, "heads": 4, "n": 2, "d": 32},
    {"b": 2, "depth": 4000, "heads": 8, "n": 4, "d": 256},
))  # fmt: skip
PADDED = Check("attention, rotated, padding", padded_inputs, padded_formula, padded_prompt, LATER)
CHECKS = (
    TOKEN,
    TOKEN.resized("decode_attention, window, cap, norm", **ALL),
    PADDED,
    PADDED._replace(ours=padded_token).resized("split_attention, padding, cap", t=1, softcap=5.0),
)
