"""RMSNorm in one pass: each row is read once, normalised in fp32, and written once.

    rms_norm      y = x / sqrt(mean(x², axis=-1) + eps) * (1 + weight)
    add_rms_norm  h = residual + x;  y = rms_norm(h)

x, residual :: [..., dim], bf16 | fp16 | fp32
weight      :: [dim], any float; the checkpoint stores `weight`, the model scales by `1 + weight`
y, h        :: [..., dim], x.dtype

Gemma scales in fp32 and rounds once, at the store. (Llama rounds before it scales.) The sum h is
rounded to x.dtype before it is normalised, as it is when the two steps are apart.
Bound by memory: bytes = 2 (4 with the residual) * x.numel() * itemsize. Walk-through step: RMSNorm.
"""

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from gemma_fast.kernels._triton import knobs, tl, triton


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    z = x.float()
    z = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)
    return (z * (1 + weight.float())).to(x.dtype)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    h = residual + x
    return rms_norm_reference(h, weight, eps), h


@triton.jit
def _rms_norm_kernel(
    x_ptr,  # [rows, DIM]
    residual_ptr,  # [rows, DIM] | None
    weight_ptr,  # [DIM]
    out_ptr,  # [rows, DIM], contiguous
    sum_ptr,  # [rows, DIM], contiguous | None
    x_row_stride,
    residual_row_stride,
    EPS: tl.constexpr,  # constexpr: Inductor would pass a float argument as fp64
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,  # DIM rounded up to a power of two
    HAS_RESIDUAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # int64: row * DIM passes 2**31 on long batches
    cols = tl.arange(0, BLOCK)
    mask = cols < DIM

    x = tl.load(x_ptr + row * x_row_stride + cols, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_row_stride + cols, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + row * DIM + cols, x, mask=mask)
    x = x.to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    inv_rms = tl.rsqrt(tl.sum(x * x) / DIM + EPS)
    tl.store(out_ptr + row * DIM + cols, x * inv_rms * (1 + weight), mask=mask)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor | None]:
    dim = x.shape[-1]
    assert weight.shape == (dim,), f"{tuple(weight.shape)=} does not fit {tuple(x.shape)=}"
    assert x.stride(-1) == weight.stride(0) == 1, "rows and weight must be contiguous"
    rows = x.reshape(-1, dim)
    out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    total, residual_row_stride = None, 0
    if residual is not None:
        assert residual.shape == x.shape and residual.dtype == x.dtype and residual.stride(-1) == 1
        residual = residual.reshape(-1, dim)
        total, residual_row_stride = torch.empty_like(out), residual.stride(0)

    block = triton.next_power_of_2(dim)
    if rows.shape[0]:
        wrap_triton(_rms_norm_kernel)[(rows.shape[0],)](
            rows, residual, weight, out, total, rows.stride(0), residual_row_stride,
            EPS=eps, DIM=dim, BLOCK=block, HAS_RESIDUAL=residual is not None,
            num_warps=min(max(block // 256, 1), 8),
        )  # fmt: skip
    return out.view(x.shape), None if total is None else total.view(x.shape)


@triton_op("gemma_fast::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Gemma's RMSNorm of the last axis. Falls back to the reference off the GPU."""
    if not (x.is_cuda or knobs.runtime.interpret):
        return rms_norm_reference(x, weight, eps)
    return _launch(x, None, weight, eps)[0]


@triton_op("gemma_fast::add_rms_norm", mutates_args=())
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The residual add and the RMSNorm that follows it: (normalised sum, sum)."""
    if not (x.is_cuda or knobs.runtime.interpret):
        return add_rms_norm_reference(x, residual, weight, eps)
    normed, total = _launch(x, residual, weight, eps)
    assert total is not None
    return normed, total
