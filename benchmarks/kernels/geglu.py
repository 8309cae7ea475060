"""GeGLU: the elementwise op, and the gate+up product with GeGLU as its epilogue."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
from gemma_fast.kernels.geglu import gate_up_geglu, geglu, geglu_reference


def inputs(device: torch.device, dtype: torch.dtype, rows: int, dim: int) -> tuple[Tensor]:
    """gate_up :: [rows, 2 * dim]"""
    return (torch.randn(rows, 2 * dim, device=device, dtype=dtype),)


def work(itemsize: int, rows: int, dim: int) -> Work:
    """gate and up are read, y written; ten FLOPs an output, tanh counted as one."""
    return Work(3 * rows * dim * itemsize, 10 * rows * dim)


def eager(gate_up: Tensor) -> Tensor:
    """In the input's dtype; gelu(gate) is rounded before it is multiplied."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def liger_geglu(gate_up: Tensor) -> Call:
    """Takes gate and up apart, each contiguous."""
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    gate, up = (half.contiguous() for half in gate_up.chunk(2, dim=-1))
    return lambda: LigerGELUMulFunction.apply(gate, up)


def liger_cute_geglu(gate_up: Tensor) -> Call:
    from liger_kernel.functional import geglu

    gate, up = (half.contiguous() for half in gate_up.chunk(2, dim=-1))
    return lambda: geglu(gate, up, impl="nvidia-cutedsl")


def flashinfer_geglu(gate_up: Tensor) -> Call:
    from flashinfer.activation import gelu_tanh_and_mul

    return lambda: gelu_tanh_and_mul(gate_up)


def product_inputs(
    device: torch.device, dtype: torch.dtype, m: int, k: int, dim: int
) -> tuple[Tensor, Tensor]:
    """x :: [m, k], gate_up_proj :: [2 * dim, k], so that a product is about normal(0, 1)"""
    x = torch.randn(m, k, device=device, dtype=dtype)
    return x, torch.randn(2 * dim, k, device=device, dtype=dtype) * k**-0.5


def product_work(itemsize: int, m: int, k: int, dim: int) -> Work:
    """2 * m * k FLOPs for each of 2 * dim columns; x and weights read, [m, dim] written."""
    return Work((m * k + 2 * dim * k + m * dim) * itemsize, 4 * m * k * dim)


def product_then_geglu(x: Tensor, gate_up_proj: Tensor) -> Tensor:
    return eager(F.linear(x, gate_up_proj))


def cublas_geglu(x: Tensor, gate_up_proj: Tensor) -> Call:
    return lambda: geglu(*F.linear(x, gate_up_proj).chunk(2, dim=-1))


def cublas_compiled(x: Tensor, gate_up_proj: Tensor) -> Call:
    return lambda: compiled(eager)(F.linear(x, gate_up_proj))


def quack_product(x: Tensor, gate_up_proj: Tensor) -> Call:
    """Takes the weights as [k, 2 * dim], a gate's column beside its up's."""
    from quack.gemm_interface import gemm_gated

    gate, up = gate_up_proj.chunk(2)
    weight = torch.stack((gate, up), dim=1).flatten(0, 1).mT
    return lambda: gemm_gated(x, weight, activation="geglu", store_preact=False)[1]


def ours(x: Tensor, gate_up_proj: Tensor) -> Call:
    return lambda: gate_up_geglu(x, gate_up_proj)


GEGLU = Suite(
    name="geglu",
    about="gelu(gate) * up of [rows, 2 * dim]",
    yardstick=True,
    sizes={
        f"{rows} x 2*{dim}": {"rows": rows, "dim": dim}
        for rows, dim in [(512, 16384), (2048, 16384), (8192, 16384), (8192, 2048)]
    },
    tiny={"5 x 2*48": {"rows": 5, "dim": 48}},
    inputs=inputs,
    oracle=lambda x: geglu_reference(*x.chunk(2, dim=-1)),
    work=work,
    providers={
        EAGER: lambda x: lambda: eager(x),
        "torch.compile": lambda x: lambda: compiled(eager)(x),
        "liger": liger_geglu,
        "liger (CuTe)": liger_cute_geglu,
        "flashinfer": flashinfer_geglu,
        OURS: lambda x: lambda: geglu(*x.chunk(2, dim=-1)),
    },
)
GATE_UP_GEGLU = Suite(
    name="gate_up_geglu",
    about="The product [m, k] x [k, 2 * dim] and GeGLU of it",
    yardstick=False,
    sizes={
        f"m {m}, k 2048, dim 16384": {"m": m, "k": 2048, "dim": 16384} for m in (128, 512, 4096)
    },
    tiny={"m 5, k 64, dim 48": {"m": 5, "k": 64, "dim": 48}},
    inputs=product_inputs,
    oracle=product_then_geglu,
    work=product_work,
    providers={
        EAGER: lambda *inputs: lambda: product_then_geglu(*inputs),
        "torch.compile": lambda *inputs: lambda: compiled(product_then_geglu)(*inputs),
        "cuBLAS + compiled epilogue": cublas_compiled,
        "cuBLAS + geglu": cublas_geglu,
        "quack": quack_product,
        OURS_BY_POINTERS: by_pointers(ours),
        OURS: ours,
    },
)
