"""Suites of RMSNorm, and of residual add + RMSNorm without or (Gemma 2 to 4) with a post-norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_fast.benchmarks.kernels.rivals import plain, torch_compiled
from gemma_fast.benchmarks.kernels.suite import Call, Check, Prepare, Suite, Tuning
from gemma_fast.benchmarks.measure.machine import Work
from gemma_fast.benchmarks.measure.outcome import EAGER, OURS
from gemma_fast.kernels import rmsnorm as module
from gemma_fast.kernels.rmsnorm import add_rms_norm_reference, rms_norm_reference
from gemma_fast.reference import rms_norm

Op = Callable[..., Any]
EPS = 1e-6
SHAPES = [(512, 2048), (8192, 2048), (32768, 2048), (8192, 640), (8192, 2304)]
SIZES = {f"{rows} x {dim}": {"rows": rows, "dim": dim} for rows, dim in SHAPES}
TINY = {"5 x 48": {"rows": 5, "dim": 48}}
ROWS = {"rows": 16, "dim": 640}, {"rows": 512, "dim": 2304}


def norm_inputs(rows: int, dim: int, **make: Any) -> tuple[Any, ...]:
    """Returns x :: [rows, dim] and weight :: [dim]."""
    return torch.randn(rows, dim, **make), torch.randn(dim, **make) / 2


def add_inputs(rows: int, dim: int, post: bool = False, **make: Any) -> tuple[Any, ...]:
    """Returns x, residual :: [rows, dim]; weight :: [dim]; post_weight :: [dim] if `post`, or else
    None."""
    x, weight = norm_inputs(rows, dim, **make)
    residual = torch.randn_like(x)
    return x, residual, weight, (torch.randn_like(weight) / 2 if post else None)


def norm_work(itemsize: int, rows: int, dim: int) -> Work:
    """Counts the bytes of x and y, and four FLOPs per element: square, sum, times 1/rms, times
    weight."""
    return Work(2 * rows * dim * itemsize, 4 * rows * dim)


def add_work(itemsize: int, rows: int, dim: int, post: bool = False) -> Work:
    """Counts the bytes of x, residual, y and h, and five FLOPs per element (four as in norm_work,
    one for the add), or nine with a post-norm."""
    return Work(4 * rows * dim * itemsize, (5 + 4 * post) * rows * dim)


def norm(x: Tensor, weight: Tensor | None) -> Tensor:
    """Returns the RMSNorm of x, or x itself if weight is None."""
    return x if weight is None else rms_norm(x, weight, EPS)


def add(
    x: Tensor, residual: Tensor, weight: Tensor, post: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    h = residual + norm(x, post)
    return norm(h, weight), h


def torch_norm(x: Tensor, weight: Tensor) -> Call:
    scale = 1 + weight
    return lambda: F.rms_norm(x, scale.shape, scale, EPS)


def liger() -> tuple[Op, Op]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    options = EPS, 1.0, "gemma", False
    norm, add = LigerRMSNormFunction.apply, LigerFusedAddRMSNormFunction.apply
    return lambda *tensors: norm(*tensors, *options), lambda *tensors: add(*tensors, *options)


def liger_cute() -> tuple[Op, Op]:
    """Returns Liger's ops in CuTe, which need compute capability 9.0 or newer."""
    from liger_kernel.functional import fused_add_rms_norm, rms_norm

    options, impl = (EPS, 1.0, "gemma"), {"impl": "nvidia-cutedsl"}
    return (
        lambda x, weight: rms_norm(x, weight, EPS, offset=1.0, casting_mode="gemma", **impl),
        lambda *tensors: fused_add_rms_norm(*tensors, *options, **impl),
    )


def quack() -> tuple[Op, Op]:
    """Returns quack's ops. Like flashinfer and Liger's CuTe kernel, they do not round x + residual
    before the norm."""
    from quack.rmsnorm import rmsnorm_fwd

    norm = partial(rmsnorm_fwd, eps=EPS, weight_offset=1.0)
    return (
        lambda x, weight: norm(x, weight)[0],
        lambda x, residual, weight: norm(x, weight, residual=residual)[:2],
    )


def flashinfer() -> tuple[Op, Op]:
    """Returns flashinfer's ops. The residual add overwrites x (or the post-norm's output) with y,
    and residual with h. So each replay adds to the results of the previous replay; these
    results stay finite in bf16."""
    from flashinfer.norm import gemma_fused_add_rmsnorm, gemma_rmsnorm

    def add(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        gemma_fused_add_rmsnorm(x, residual, weight, EPS)
        return x, residual

    return lambda x, weight: gemma_rmsnorm(x, weight, EPS), add


# Each function imports a library and returns two of its ops: the norm, and residual add + norm.
LIBRARIES = {"liger": liger, "liger (CuTe)": liger_cute, "quack": quack, "flashinfer": flashinfer}


def norm_by(library: Callable[[], tuple[Op, Op]]) -> Prepare:
    def prepare(x: Tensor, weight: Tensor) -> Call:
        norm, _ = library()
        return lambda: norm(x, weight)

    return prepare


def add_by(library: Callable[[], tuple[Op, Op]]) -> Prepare:
    def prepare(x: Tensor, residual: Tensor, weight: Tensor, post: Tensor | None = None) -> Call:
        norm, add = library()
        return lambda: add(x if post is None else norm(x, post), residual, weight)

    return prepare


RMS_NORM = Suite(
    name="rms_norm",
    about="RMSNorm of [rows, dim]",
    yardstick=True,
    sizes=SIZES,
    tiny=TINY,
    inputs=norm_inputs,
    oracle=rms_norm_reference,
    work=norm_work,
    tuning=Tuning("rms_norm", lambda size: {"num_warps": (1, 2, 4, 8, 16)}),
    providers={
        EAGER: plain(rms_norm_reference),
        "torch.compile": torch_compiled(rms_norm_reference),
        "F.rms_norm": torch_norm,
        **{name: norm_by(library) for name, library in LIBRARIES.items()},
        OURS: plain(module.rms_norm),
    },
)
ADD_RMS_NORM = replace(
    RMS_NORM,
    name="add_rms_norm",
    about="Residual add, then RMSNorm, of [rows, dim]",
    inputs=add_inputs,
    oracle=add_rms_norm_reference,
    work=add_work,
    providers={
        EAGER: plain(add_rms_norm_reference),
        "torch.compile": torch_compiled(add_rms_norm_reference),
        **{name: add_by(library) for name, library in LIBRARIES.items()},
        OURS: plain(module.add_rms_norm),
    },
)
ADD_RMS_NORM_POST = replace(
    ADD_RMS_NORM,
    name="add_rms_norm_post",
    about="RMSNorm of x, residual add, then RMSNorm; the libraries need two calls",
    sizes={k: size | {"post": True} for k, size in SIZES.items() if size["dim"] != 2048},
    tiny={k: size | {"post": True} for k, size in TINY.items()},
)
ADD = Check("add_rms_norm", add_inputs, add, ADD_RMS_NORM.providers[OURS], ROWS)
CHECKS = (
    Check("rms_norm", norm_inputs, norm, RMS_NORM.providers[OURS], ROWS),
    ADD,
    ADD.resized("add_rms_norm, post-norm", post=True),
)
