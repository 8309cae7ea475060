"""Rotary embedding of K, and the write of K and V into the cache. No library has it as one op that
takes a plain cache, so the rivals are eager PyTorch and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gemma_fast.benchmarks.kernels.suite import EAGER, OURS, Call, Suite, compiled
from gemma_fast.benchmarks.measure.machine import Work
from gemma_fast.kernels.rotary import rotary_write, rotary_write_reference

Tensors = tuple[Any, ...]


def angles(t: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos, sin :: [1, t, d / 2], fp32, of positions 0 … t − 1, theta = 1e4."""
    i = torch.arange(0, d, 2, device=device, dtype=torch.float32)
    angle = torch.arange(t, device=device)[None, :, None] * 1e4 ** (-i / d)
    return angle.cos(), angle.sin()


def inputs(
    device: torch.device, dtype: torch.dtype, t: int, n: int, d: int, norm: bool = False
) -> Tensors:
    """k, v :: [1, t, n, d]; keys, values :: [1, n, t, d], full of what must be overwritten."""
    make: dict[str, Any] = {"device": device, "dtype": dtype}
    k, v = torch.randn(2, 1, t, n, d, **make)
    keys, values = torch.randn(2, 1, n, t, d, **make)
    start = torch.zeros(1, dtype=torch.int32, device=device)
    norm_weight = torch.randn(d, **make) / 2 if norm else None
    return k, v, keys, values, *angles(t, d, device), start, norm_weight


def work(itemsize: int, t: int, n: int, d: int, norm: bool = False) -> Work:
    """k and v are read and written, cos and sin read in fp32; three FLOPs a channel of k, and four
    more with a norm."""
    return Work(4 * t * n * d * itemsize + t * d * 4, (3 + 4 * norm) * t * n * d)


def writing(op: Callable[..., None]) -> Callable[..., Call]:
    def provider(*inputs: Any) -> Call:
        def call() -> tuple[Tensor, Tensor]:
            op(*inputs)
            return inputs[2], inputs[3]

        return call

    return provider


ROTARY_WRITE = Suite(
    name="rotary_write",
    about="K rotated and written to the cache, V written; t tokens, n kv heads, d 256",
    yardstick=True,
    sizes={
        "t 2048, n 1": {"t": 2048, "n": 1, "d": 256},
        "t 8192, n 1": {"t": 8192, "n": 1, "d": 256},
        "t 8192, n 16": {"t": 8192, "n": 16, "d": 256},
        "t 8192, n 1, norm": {"t": 8192, "n": 1, "d": 256, "norm": True},
    },
    tiny={
        "t 5, n 2": {"t": 5, "n": 2, "d": 32},
        "t 5, n 1, norm": {"t": 5, "n": 1, "d": 32, "norm": True},
    },
    inputs=inputs,
    oracle=lambda *inputs: writing(rotary_write_reference)(*inputs)(),
    work=work,
    providers={
        EAGER: writing(rotary_write_reference),
        "torch.compile": writing(lambda *inputs: compiled(rotary_write_reference)(*inputs)),
        OURS: writing(rotary_write),
    },
)
