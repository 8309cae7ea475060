"""RMSNorm in one pass: each row is read once, normalized in fp32 and written once.

    rms_norm      y = x / sqrt(mean(x², axis=-1) + eps) * (1 + weight)
    add_rms_norm  h = residual + x, or in Gemma 2 and 3 residual + rms_norm(x, post_weight)
                  y = rms_norm(h, weight)

x, residual         :: [..., dim], bf16 | fp16 | fp32
weight, post_weight :: [dim], any float; the checkpoint stores w, the norm multiplies by 1 + w
y, h                :: [..., dim], x.dtype

Gemma scales in fp32 and rounds once, at the store. (Llama rounds before it scales.) The post-norm's
result and h are rounded to x.dtype, as in separate steps.
Bound by memory: bytes = 2 (4 with the residual) * x.numel() * itemsize. Walk-through step: RMSNorm.
"""

import torch
from torch import Tensor

from gemma_fast.kernels._op import op
from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels.launch import launch_config, runs_triton


def rms_norm_reference(
    x: Tensor, weight: Tensor | None, eps: float = 1e-6, offset: float = 1.0
) -> Tensor:
    z = x.float()
    z = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)
    return (z if weight is None else z * (offset + weight.float())).to(x.dtype)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, post_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    h = residual + (x if post_weight is None else rms_norm_reference(x, post_weight, eps))
    return rms_norm_reference(h, weight, eps), h


@triton.jit
def _normalize(x, weight_ptr, cols, mask, EPS: tl.constexpr, DIM: tl.constexpr):
    """Returns the RMSNorm of one row x :: [BLOCK], fp32."""
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    return x * tl.rsqrt(tl.sum(x * x) / DIM + EPS) * (1 + weight)


@triton.jit
def _rms_norm_kernel(
    x_ptr,  # [rows, DIM]
    residual_ptr,  # [rows, DIM] | None
    weight_ptr,  # [DIM]
    post_weight_ptr,  # [DIM] | None
    out_ptr,  # [rows, DIM], contiguous
    h_ptr,  # [rows, DIM], contiguous | None
    x_row_stride,
    residual_row_stride,
    EPS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,  # DIM rounded up to a power of two
):
    row = tl.program_id(0).to(tl.int64)  # int64: row * DIM passes 2**31 on long batches
    cols = tl.arange(0, BLOCK)  # [BLOCK]
    mask = cols < DIM
    dtype = out_ptr.dtype.element_ty

    x = tl.load(x_ptr + row * x_row_stride + cols, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * residual_row_stride + cols, mask=mask, other=0.0)
        if post_weight_ptr is not None:
            x = _normalize(x, post_weight_ptr, cols, mask, EPS, DIM).to(dtype).to(tl.float32)
        h = (x + residual.to(tl.float32)).to(dtype)
        tl.store(h_ptr + row * DIM + cols, h, mask=mask)
        x = h.to(tl.float32)
    tl.store(out_ptr + row * DIM + cols, _normalize(x, weight_ptr, cols, mask, EPS, DIM), mask=mask)


def default_config(dim: int) -> dict[str, int]:
    """Returns the launch config: a block is a whole row."""
    block = triton.next_power_of_2(dim)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 8)}


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, post_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    dim = x.shape[-1]
    for w in (weight, weight if post_weight is None else post_weight):
        assert w.shape == (dim,), f"weight {tuple(w.shape)} does not fit x {tuple(x.shape)}"
        assert x.stride(-1) == w.stride(0) == 1, "rows and weights must be contiguous"
    rows = x.reshape(-1, dim)  # [rows, dim]
    out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    h, residual_row_stride = None, 0
    if residual is not None:
        assert residual.shape == x.shape and residual.dtype == x.dtype and residual.stride(-1) == 1
        residual = residual.reshape(-1, dim)  # [rows, dim]
        h, residual_row_stride = torch.empty_like(out), residual.stride(0)

    if rows.shape[0]:
        _rms_norm_kernel[(rows.shape[0],)](
            rows, residual, weight, post_weight, out, h, rows.stride(0), residual_row_stride,
            EPS=eps, DIM=dim, **launch_config("rms_norm", default_config(dim)),
        )  # fmt: skip
    return out.view(x.shape), None if h is None else h.view(x.shape)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@op(fake=lambda x, *_: _like(x))
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Gemma's RMSNorm of the last axis. Runs the reference where Triton does not run."""
    if not runs_triton(x):
        return rms_norm_reference(x, weight, eps).contiguous()
    return _launch(x, None, weight, None, eps)[0]


@op(fake=lambda x, *_: (_like(x), _like(x)))
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, post_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Adds x, normalized if post_weight is given, to the residual, and normalizes the sum. Returns
    (y, h). Runs the reference where Triton does not run."""
    if not runs_triton(x):
        y, h = add_rms_norm_reference(x, residual, weight, post_weight, eps)
        return y.contiguous(), h.contiguous()
    y, total = _launch(x, residual, weight, post_weight, eps)
    assert total is not None
    return y, total
