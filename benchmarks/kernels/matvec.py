"""The products of a decode step, of b rows: alone, and with norm, residual and GeGLU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_fast.benchmarks.kernels.suite import (
    EAGER,
    OURS,
    OURS_ALONE,
    Call,
    Suite,
    alone,
    compiled,
)
from gemma_fast.benchmarks.measure.machine import Work
from gemma_fast.kernels.matvec import linear, norm_linear

EPS = 1e-6


def inputs(
    device: torch.device, dtype: torch.dtype, b: int, dim: int, out: int
) -> tuple[Tensor, Tensor]:
    """x :: [b, dim], weight :: [out, dim], so that a product is about normal(0, 1)"""
    x = torch.randn(b, dim, device=device, dtype=dtype)
    return x, torch.randn(out, dim, device=device, dtype=dtype) * dim**-0.5


def work(itemsize: int, b: int, dim: int, out: int) -> Work:
    return Work((out * dim + b * dim + b * out) * itemsize, 2 * b * out * dim)


def norm_inputs(
    device: torch.device, dtype: torch.dtype, b: int, dim: int, out: int, geglu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """x, residual :: [b, dim], norm_weight :: [dim], weight :: [out, dim]"""
    x, weight = inputs(device, dtype, b, dim, out)
    residual, norm_weight = torch.randn_like(x), torch.randn_like(x[0]) / 4
    return x, residual, norm_weight, weight, geglu


def norm_work(itemsize: int, b: int, dim: int, out: int, geglu: bool) -> Work:
    """The residual is read and written, too."""
    values = out * dim + dim + 3 * b * dim + b * out // (1 + geglu)
    return Work(values * itemsize, 2 * b * out * dim)


def norm_eager(
    x: Tensor, residual: Tensor, norm_weight: Tensor, weight: Tensor, geglu: bool
) -> tuple[Tensor, Tensor]:
    residual = residual + x
    y = F.linear(F.rms_norm(residual, norm_weight.shape, 1 + norm_weight, EPS), weight)
    if geglu:
        gate, up = y.chunk(2, dim=-1)
        y = F.gelu(gate, approximate="tanh") * up
    return y, residual


def ours(*given: Any) -> Call:
    return lambda: linear(*given, prefetch=True)


def norm_ours(*given: Any) -> Call:
    x, residual, norm_weight, weight, geglu = given
    return lambda: norm_linear(
        x, residual, norm_weight, None, weight, geglu=geglu, eps=EPS, prefetch=True
    )


LINEAR = Suite(
    name="linear",
    about="The product [b, dim] x [dim, out]: output and down projection of Gemma 2B, 270M",
    yardstick=True,
    sizes={
        f"{dim} x {out}, b {b}": {"b": b, "dim": dim, "out": out}
        for dim, out in ((16384, 2048), (2048, 2048), (2048, 640))
        for b in (1, 8)
    },
    tiny={"64 x 48, b 1": {"b": 1, "dim": 64, "out": 48}},
    inputs=inputs,
    oracle=F.linear,
    work=work,
    providers={
        EAGER: lambda *given: lambda: F.linear(*given),
        "torch.compile": lambda *given: lambda: compiled(F.linear)(*given),
        OURS_ALONE: alone(ours),
        OURS: ours,
    },
)
NORM_LINEAR = Suite(
    name="norm_linear",
    about="Residual, RMSNorm and product: qkv projection, and gate and up with GeGLU, of Gemma 2B",
    yardstick=True,
    sizes={
        f"{dim} x {out}{', geglu' * geglu}, b {b}": {
            "b": b, "dim": dim, "out": out, "geglu": geglu,
        }
        for dim, out, geglu in ((2048, 32768, True), (2048, 2560, False))
        for b in (1, 8)
    },
    tiny={
        "64 x 48, b 1": {"b": 1, "dim": 64, "out": 48, "geglu": False},
        "64 x 48, geglu, b 3": {"b": 3, "dim": 64, "out": 48, "geglu": True},
    },
    inputs=norm_inputs,
    oracle=norm_eager,
    work=norm_work,
    providers={
        EAGER: lambda *given: lambda: norm_eager(*given),
        "torch.compile": lambda *given: lambda: compiled(norm_eager)(*given),
        OURS_ALONE: alone(norm_ours),
        OURS: norm_ours,
    },
)  # fmt: skip
