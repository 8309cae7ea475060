"""GeGLU: the gated activation of the MLP, on the product of both projections at once.

    y = gelu(gate) * up    with  gate, up = halves of gate_up
    gelu(g) = g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 g³)))     # the tanh approximation

gate_up :: [..., 2 * dim], bf16 | fp16 | fp32; the first half of a row is the gate
returns :: [..., dim], gate_up.dtype

Computed in fp32 and rounded once. Eager PyTorch also rounds gelu(gate) to the input's dtype.
Bound by memory: bytes = 3 * y.numel() * itemsize. Walk-through step: GeGLU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_fast.kernels._op import op
from gemma_fast.kernels._triton import knobs, tl, triton


def geglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)


@triton.jit
def _geglu_kernel(
    gate_up_ptr,  # [rows, 2 * DIM]
    out_ptr,  # [rows, DIM], contiguous
    gate_up_row_stride,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < DIM

    gate_ptr = gate_up_ptr + row * gate_up_row_stride
    gate = tl.load(gate_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + DIM + cols, mask=mask, other=0.0).to(tl.float32)
    z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    gelu = gate * tl.sigmoid(2 * z)  # (1 + tanh(z)) / 2 == sigmoid(2 z)
    tl.store(out_ptr + row * DIM + cols, gelu * up, mask=mask)


@op(fake=lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2))
def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up of a fused gate+up product. Falls back to the reference off the GPU."""
    dim = gate_up.shape[-1] // 2
    assert gate_up.shape[-1] == 2 * dim, f"gate and up must be of one size: {tuple(gate_up.shape)=}"
    if not (gate_up.is_cuda or knobs.runtime.interpret):
        return geglu_reference(gate_up)

    assert gate_up.stride(-1) == 1, "rows must be contiguous"
    rows = gate_up.reshape(-1, 2 * dim)
    out = torch.empty((rows.shape[0], dim), dtype=gate_up.dtype, device=gate_up.device)
    block = min(triton.next_power_of_2(dim), 1024)
    if rows.shape[0]:
        _geglu_kernel[(rows.shape[0], triton.cdiv(dim, block))](
            rows, out, rows.stride(0), DIM=dim, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out.view(*gate_up.shape[:-1], dim)
