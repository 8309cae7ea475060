"""Suites of the projections in a decode step: alone, and with norm, residual and GeGLU.

The input x has b rows, one for each sequence of the batch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_fast.benchmarks.kernels.geglu import eager as geglu_of
from gemma_fast.benchmarks.kernels.rivals import plain, torch_compiled
from gemma_fast.benchmarks.kernels.rmsnorm import EPS, add
from gemma_fast.benchmarks.kernels.suite import Call, Check, Choices, Size, Suite, Tuning
from gemma_fast.benchmarks.measure.machine import Work
from gemma_fast.benchmarks.measure.outcome import EAGER, OURS, OURS_ALONE
from gemma_fast.kernels import matvec as module


def inputs(b: int, dim: int, out: int, **make: Any) -> tuple[Tensor, Tensor]:
    """Returns x :: [b, dim], weight :: [out, dim], such that outputs are about normal(0, 1)."""
    return torch.randn(b, dim, **make), torch.randn(out, dim, **make) * dim**-0.5


def work(itemsize: int, b: int, dim: int, out: int) -> Work:
    return Work((out * dim + b * dim + b * out) * itemsize, 2 * b * out * dim)


def norm_inputs(
    b: int, dim: int, out: int, geglu: bool = False, post: bool = False, **make: Any
) -> tuple[Any, ...]:
    """Returns x, residual :: [b, dim]; norm_weight, post_norm_weight :: [dim] (the latter may be
    None); weight :: [out, dim]; geglu."""
    x, weight = inputs(b, dim, out, **make)
    residual, norm_weight = torch.randn_like(x), torch.randn_like(x[0]) / 4
    post_norm_weight = torch.randn_like(norm_weight) / 2 if post else None
    return x, residual, norm_weight, post_norm_weight, weight, geglu


def norm_work(itemsize: int, b: int, dim: int, out: int, geglu: bool) -> Work:
    """Counts like `work`, and adds the norm's weight and the residual, which is read and written.
    With geglu, the output has out / 2 columns."""
    values = out * dim + dim + 3 * b * dim + b * out // (1 + geglu)
    return Work(values * itemsize, 2 * b * out * dim)


def norm_eager(
    x: Tensor, residual: Tensor, norm_weight: Tensor, _: None, weight: Tensor, geglu: bool
) -> tuple[Tensor, Tensor]:
    residual = residual + x
    y = F.linear(F.rms_norm(residual, norm_weight.shape, 1 + norm_weight, EPS), weight)
    return geglu_of(y) if geglu else y, residual


def norm_formula(*given: Any) -> tuple[Tensor, Tensor]:
    *tensors, weight, geglu = given
    normed, h = add(*tensors)
    y = F.linear(normed, weight)
    return geglu_of(y) if geglu else y, h


def norm_ours(*given: Any, pdl: bool = True) -> Call:
    *tensors, geglu = given
    return lambda: module.norm_linear(*tensors, geglu=geglu, eps=EPS, pdl=pdl)


def matmul_choices(size: Size, one_row: Choices) -> Choices:
    """Returns `one_row` if x has one row, or else the choices of the tensor core kernel."""
    several = {"BLOCK_N": (16, 32, 64), "BLOCK_K": (128, 256, 512), "STAGES": (3, 4, 6)}
    return several if size["b"] > 1 else one_row


def choices(size: Size) -> Choices:
    return matmul_choices(size, {
        "BLOCK_N": (2, 4, 8, 16), "BLOCK_K": (1024, 2048), "STAGES": (4, 6), "num_warps": (4, 8),
    })  # fmt: skip


LINEAR = Suite(
    name="linear",
    about="Matmul [b, dim] x [dim, out]: output and down projection of Gemma 2B, 270M",
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
    tuning=Tuning("matvec", choices),
    providers={
        EAGER: plain(F.linear),
        "torch.compile": torch_compiled(F.linear),
        OURS_ALONE: plain(partial(module.linear, pdl=False)),
        OURS: plain(partial(module.linear, pdl=True)),
    },
)
NORM_LINEAR = Suite(
    name="norm_linear",
    about="Residual, RMSNorm and projection: qkv, and gate and up with GeGLU, of Gemma 2B",
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
    tuning=Tuning("matvec", choices),
    providers={
        EAGER: plain(norm_eager),
        "torch.compile": torch_compiled(norm_eager),
        OURS_ALONE: partial(norm_ours, pdl=False),
        OURS: norm_ours,
    },
)  # fmt: skip
MATRIX = {"b": 1, "dim": 320, "out": 96}, {"b": 1, "dim": 2304, "out": 4096}
PRODUCT = Check("linear", inputs, F.linear, LINEAR.providers[OURS], MATRIX)
NORM_PRODUCT = Check("norm_linear", norm_inputs, norm_formula, norm_ours, MATRIX)
CHECKS = (
    PRODUCT,
    PRODUCT.resized("linear, 8 rows", b=8),
    NORM_PRODUCT,
    NORM_PRODUCT.resized("norm_linear, post-norm, geglu, 8 rows", b=8, post=True, geglu=True),
)
