"""Checks of matmuls with packed weights, for `gemma-fast verify`: see kernels/packed.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_fast.benchmarks.kernels.matvec import MATRIX
from gemma_fast.benchmarks.kernels.suite import Call, Check
from gemma_fast.kernels.matvec import linear
from gemma_fast.kernels.packed import PackedRows, PackedWeight, Packing


def inputs(
    b: int, dim: int, out: int, bits: int, minimum: bool = False, **make: Any
) -> tuple[Any, ...]:
    """Returns x :: [b, dim]; values :: [out, dim], int8; scale and minimum :: [out, dim / group],
    float16 (minimum may be None). Outputs are about normal(0, 1)."""
    group, device, half = 32 if bits == 4 else 64, make["device"], make | {"dtype": torch.float16}
    low, high = (0, 16) if bits == 4 and minimum else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    values = torch.randint(low, high, (out, dim), dtype=torch.int8, device=device)
    scale = (torch.rand(out, dim // group, **half) + 0.5) * dim**-0.5 * 2 ** (2 - bits)
    shift = torch.randn(out, dim // group, **half) * dim**-0.5 if minimum else None
    return torch.randn(b, dim, **make), values, scale, shift


def formula(x: Tensor, values: Tensor, scale: Tensor, minimum: Tensor | None) -> Tensor:
    groups = values.to(x.dtype).unflatten(1, (scale.shape[1], -1))  # [out, dim / group, group]
    weight = groups * scale.to(x.dtype)[..., None]
    if minimum is not None:
        weight = weight + minimum.to(x.dtype)[..., None]
    return F.linear(x, weight.flatten(1))


def ours(x: Tensor, values: Tensor, scale: Tensor, minimum: Tensor | None, *, bits: int) -> Call:
    group = values.shape[1] // scale.shape[1]
    packing = Packing(bits, group, minimum is not None, torch.float16)
    weight: Any = PackedWeight(values.shape, packing).to(x.device)
    weight.write(0, PackedRows(values, scale, minimum))
    return lambda: linear(x, weight, pdl=True)


def check(name: str, bits: int, **keywords: Any) -> Check:
    sizes = [size | {"bits": bits} | keywords for size in MATRIX]
    return Check(name, inputs, formula, partial(ours, bits=bits), sizes)


CHECKS = (
    check("linear, int8", 8),
    check("linear, int4", 4),
    check("linear, int4 with minimum", 4, minimum=True),
    check("linear, int8 with minimum, 8 rows", 8, minimum=True, b=8),
    check("linear, int8, 40 rows", 8, b=40),
    check("linear, int4, 8 rows", 4, b=8),
    check("linear, int4 with minimum, 40 rows", 4, minimum=True, b=40),
)
