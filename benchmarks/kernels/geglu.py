"""Suites of GeGLU: the elementwise op, and the gate and up matmul with GeGLU as its epilogue."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_fast.benchmarks.kernels.rivals import by_pointers, compiled, plain, torch_compiled
from gemma_fast.benchmarks.kernels.rmsnorm import ROWS, add_inputs
from gemma_fast.benchmarks.kernels.suite import Call, Check, Suite, Tuning
from gemma_fast.benchmarks.measure.machine import Work
from gemma_fast.benchmarks.measure.outcome import EAGER, OURS, OURS_BY_POINTERS
from gemma_fast.kernels import geglu as module
from gemma_fast.kernels.geglu import geglu_reference
from gemma_fast.reference import geglu


def inputs(rows: int, dim: int, **make: Any) -> tuple[Tensor]:
    """Returns gate_up :: [rows, 2 * dim]."""
    return (torch.randn(rows, 2 * dim, **make),)


def work(itemsize: int, rows: int, dim: int) -> Work:
    """Counts the bytes of gate, up and the output. Counts ten FLOPs per output, one for tanh."""
    return Work(3 * rows * dim * itemsize, 10 * rows * dim)


def eager(gate_up: Tensor) -> Tensor:
    """Computes GeGLU in the input's dtype, so gelu(gate) is rounded before the multiplication."""
    return geglu(*gate_up.chunk(2, dim=-1))


def ours(gate_up: Tensor) -> Tensor:
    return module.geglu(*gate_up.chunk(2, dim=-1))


def liger_geglu(gate_up: Tensor) -> Call:
    """Returns a call of liger's op, which takes gate and up as two contiguous tensors."""
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    gate, up = (half.contiguous() for half in gate_up.chunk(2, dim=-1))
    return lambda: LigerGELUMulFunction.apply(gate, up)


def liger_cute_geglu(gate_up: Tensor) -> Call:
    from liger_kernel.functional import geglu as liger

    gate, up = (half.contiguous() for half in gate_up.chunk(2, dim=-1))
    return lambda: liger(gate, up, impl="nvidia-cutedsl")


def flashinfer_geglu(gate_up: Tensor) -> Call:
    from flashinfer.activation import gelu_tanh_and_mul

    return lambda: gelu_tanh_and_mul(gate_up)


def product_inputs(m: int, k: int, dim: int, **make: Any) -> tuple[Tensor, Tensor]:
    """Returns x :: [m, k] and gate_up_proj :: [2 * dim, k], scaled so that the matmul's outputs are
    about normal(0, 1)."""
    return torch.randn(m, k, **make), torch.randn(2 * dim, k, **make) * k**-0.5


def product_work(itemsize: int, m: int, k: int, dim: int) -> Work:
    """Counts the bytes of x, the weights and the output [m, dim], and 2 * m * k FLOPs for each of
    the 2 * dim columns."""
    return Work((m * k + 2 * dim * k + m * dim) * itemsize, 4 * m * k * dim)


def product_then_geglu(x: Tensor, gate_up_proj: Tensor) -> Tensor:
    return eager(F.linear(x, gate_up_proj))


def quack_product(x: Tensor, gate_up_proj: Tensor) -> Call:
    """Returns a call of quack's op, whose weights are [k, 2 * dim], with gate and up columns
    interleaved."""
    from quack.gemm_interface import gemm_gated

    gate, up = gate_up_proj.chunk(2)
    weight = torch.stack((gate, up), dim=1).flatten(0, 1).mT
    return lambda: gemm_gated(x, weight, activation="geglu", store_preact=False)[1]


GATE_UP_CHOICES = {
    "BLOCK_M": (64, 128, 256), "BLOCK_N": (64, 128), "num_stages": (3, 4), "GROUP_M": (4, 8),
}  # fmt: skip
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
    tuning=Tuning("geglu", lambda size: {"BLOCK": (512, 1024, 2048, 4096), "num_warps": (2, 4, 8)}),
    providers={
        EAGER: plain(eager),
        "torch.compile": torch_compiled(eager),
        "liger": liger_geglu,
        "liger (CuTe)": liger_cute_geglu,
        "flashinfer": flashinfer_geglu,
        OURS: plain(ours),
    },
)
GATE_UP_GEGLU = Suite(
    name="gate_up_geglu",
    about="Matmul [m, k] x [k, 2 * dim], then GeGLU",
    sizes={
        f"m {m}, k 2048, dim 16384": {"m": m, "k": 2048, "dim": 16384} for m in (128, 512, 4096)
    },
    tiny={"m 5, k 64, dim 48": {"m": 5, "k": 64, "dim": 48}},
    inputs=product_inputs,
    oracle=product_then_geglu,
    work=product_work,
    tuning=Tuning("gate_up_geglu", lambda size: GATE_UP_CHOICES),
    providers={
        EAGER: plain(product_then_geglu),
        "torch.compile": torch_compiled(product_then_geglu),
        "cuBLAS + compiled epilogue": plain(lambda x, weight: compiled(eager)(F.linear(x, weight))),
        "cuBLAS + geglu": plain(lambda x, weight: ours(F.linear(x, weight))),
        "quack": quack_product,
        OURS_BY_POINTERS: by_pointers("gate_up_geglu", plain(module.gate_up_geglu)),
        OURS: plain(module.gate_up_geglu),
    },
)
CHECKS = (
    Check("geglu", lambda **size: add_inputs(**size)[:2], geglu, plain(module.geglu), ROWS),
    Check(
        "gate_up_geglu", product_inputs, product_then_geglu, plain(module.gate_up_geglu),
        [{"m": 40, "k": 320, "dim": 96}, {"m": 512, "k": 2304, "dim": 4096}],
    ),
)  # fmt: skip
