"""Suite of rotary_write: rotates K, and writes K and V to the cache.

No library does this in one op with an unpaged cache, so the rivals are eager PyTorch and
torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gemma_fast.benchmarks.kernels.rivals import compiled, plain
from gemma_fast.benchmarks.kernels.rmsnorm import norm
from gemma_fast.benchmarks.kernels.suite import Check, Suite, Tuning
from gemma_fast.benchmarks.measure.machine import Work
from gemma_fast.benchmarks.measure.outcome import EAGER, OURS
from gemma_fast.kernels import rotary as module
from gemma_fast.kernels.rotary import rotary_write_reference

Tensors = tuple[Any, ...]


def angles(t: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns cos, sin :: [1, t, d / 2], fp32, for positions 0 … t − 1 and theta = 1e4."""
    i = torch.arange(0, d, 2, device=device, dtype=torch.float32)
    angle = torch.arange(t, device=device)[None, :, None] * 1e4 ** (-i / d)
    return angle.cos(), angle.sin()


def inputs(t: int, n: int, d: int, norm: bool = False, **make: Any) -> Tensors:
    """Returns k, v :: [1, t, n, d]; keys, values :: [1, n, t, d], which the op overwrites; cos,
    sin; query_offset; norm_weight or None."""
    k, v = torch.randn(2, 1, t, n, d, **make)
    keys, values = torch.randn(2, 1, n, t, d, **make)
    query_offset = torch.zeros(1, dtype=torch.int32, device=k.device)
    norm_weight = torch.randn(d, **make) / 2 if norm else None
    return k, v, keys, values, *angles(t, d, k.device), query_offset, norm_weight


def work(itemsize: int, t: int, n: int, d: int, norm: bool = False) -> Work:
    """Counts the bytes of k and v (read and written), and of cos and sin (read, in fp32). Counts
    three FLOPs per channel of k, or seven with a norm."""
    return Work(4 * t * n * d * itemsize + t * d * 4, (3 + 4 * norm) * t * n * d)


def norm_and_rotate(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    """Normalizes (unless weight is None) and rotates x :: [b, t, heads, d]. cos and sin, which are
    [b, t, d / 2], are rounded to x's dtype first."""
    x = norm(x, weight)
    cos, sin = (torch.cat((y, y), dim=-1).to(x.dtype).unsqueeze(2) for y in (cos, sin))
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


def formula(*given: Any) -> tuple[Tensor, Tensor]:
    """Computes the keys and values that rotary_write writes for t tokens at positions 0 … t − 1.
    The tokens fill all slots."""
    k, v, _, _, cos, sin, _, weight = given
    return norm_and_rotate(k, weight, cos, sin).transpose(1, 2), v.transpose(1, 2)


def writing(op: Callable[..., None]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns a function that calls the op and returns the keys and values that the op wrote."""

    def write(*inputs: Any) -> tuple[Tensor, Tensor]:
        op(*inputs)
        return inputs[2], inputs[3]

    return write


ROTARY_WRITE = Suite(
    name="rotary_write",
    about="Rotation of K, write of K and V to the cache; t tokens, n kv heads, d 256",
    yardstick=True,
    sizes={
        f"t {t}, n {n}{', norm' * norm}": {"t": t, "n": n, "d": 256, "norm": norm}
        for t, n, norm in ((2048, 1, False), (8192, 1, False), (8192, 16, False), (8192, 1, True))
    },
    tiny={
        "t 5, n 2": {"t": 5, "n": 2, "d": 32},
        "t 5, n 1, norm": {"t": 5, "n": 1, "d": 32, "norm": True},
    },
    inputs=inputs,
    oracle=writing(rotary_write_reference),
    work=work,
    tuning=Tuning("rotary_write", lambda size: {"BLOCK": (4, 8, 16, 32), "num_warps": (4, 8)}),
    providers={
        EAGER: plain(writing(rotary_write_reference)),
        "torch.compile": plain(writing(lambda *inputs: compiled(rotary_write_reference)(*inputs))),
        OURS: plain(writing(module.rotary_write)),
    },
)
TOKENS = {"t": 40, "n": 2, "d": 32}, {"t": 1024, "n": 4, "d": 256}
WRITE = Check("rotary_write", inputs, formula, ROTARY_WRITE.providers[OURS], TOKENS)
CHECKS = (WRITE, WRITE.resized("rotary_write, norm", norm=True))
