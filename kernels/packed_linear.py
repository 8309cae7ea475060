"""Matmul with a packed weight where _gemv.py and _skinny.py do not compute it: without Triton, and
for more than MAX_ROWS rows.

    y = x @ weightᵀ

x      :: [..., dim], bf16 | fp16 | fp32
weight :: packed, see packed.py
y      :: [..., out], x.dtype
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_fast.kernels.packed import Weight
from gemma_fast.kernels.packed_cpu import int4pack_linear, runs_int4pack

ELEMENTS = 1 << 20  # of the weight that are unpacked at once


def packed_linear(x: Tensor, weight: Weight) -> Tensor:
    """Returns x @ weightᵀ."""
    if runs_int4pack(x, weight):
        return int4pack_linear(x, weight)
    return packed_linear_reference(x, weight)


def packed_linear_reference(x: Tensor, weight: Weight) -> Tensor:
    """Unpacks some rows of the weight at a time."""
    out, dim = weight.shape
    rows = x.reshape(-1, dim)
    y = torch.empty(len(rows), out, dtype=x.dtype, device=x.device)
    step = max(ELEMENTS // dim, 1)
    for start in range(0, out, step):
        stop = min(start + step, out)
        y[:, start:stop] = F.linear(rows, weight.rows(start, stop).unpack(x.dtype))
    return y.view(*x.shape[:-1], out)
