"""RMSNorm in one pass: each row is read once, normalized in fp32 and written once.

    rms_norm      y = x / sqrt(mean(x², axis=-1) + eps) * (offset + weight)
    add_norm      h = residual + rms_norm(x, post_weight); with residual_weight
                  h = rms_norm(residual, residual_weight) + rms_norm(x, post_weight)
    add_rms_norm  h = residual + x, or from Gemma 2 on add_norm; in Gemma 4 h = layer_scalar * h
                  y = rms_norm(h, weight)

x, residual     :: [..., dim], bf16 | fp16 | fp32
…weight         :: [dim], any float; rms_norm without weight multiplies by nothing
offset          1 for Gemma 1 to 3, whose checkpoints store w - 1; 0 for Gemma 4
layer_scalar    :: [1], x.dtype
y, h            :: [..., dim], x.dtype

Gemma scales in fp32 and rounds once, at the store. (Llama rounds before it scales.) The post-norm's
result, the sum h and its product with layer_scalar are rounded to x.dtype, as in separate steps.
Bound by memory: bytes = 2 (3 in add_norm, 4 in add_rms_norm) * x.numel() * itemsize. Walk-through
step: RMSNorm.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gemma_fast.kernels._op import op, wait_for_previous_kernel
from gemma_fast.kernels._prefetch import prefetch
from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels.cpu import calls
from gemma_fast.kernels.launch import gpu, launch_config, runs_triton


def rms_norm_reference(
    x: Tensor, weight: Tensor | None, eps: float = 1e-6, offset: float = 1.0
) -> Tensor:
    z = x.float()
    z = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)
    return (z if weight is None else z * (offset + weight.float())).to(x.dtype)


def add_norm_reference(
    x: Tensor, residual: Tensor, post_weight: Tensor, eps: float = 1e-6, offset: float = 1.0,
    residual_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if residual_weight is not None:
        residual = rms_norm_reference(residual, residual_weight, eps, offset)
    return residual + rms_norm_reference(x, post_weight, eps, offset)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, post_weight: Tensor | None = None,
    eps: float = 1e-6, offset: float = 1.0, layer_scalar: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    h = residual + (x if post_weight is None else rms_norm_reference(x, post_weight, eps, offset))
    h = h if layer_scalar is None else h * layer_scalar
    return rms_norm_reference(h, weight, eps, offset), h


@triton.jit
def add_offset(weight, OFFSET: tl.constexpr):
    """Returns OFFSET + weight, by which a norm multiplies, in fp32."""
    weight = weight.to(tl.float32)
    if OFFSET != 0:
        weight = OFFSET + weight
    return weight


@triton.jit
def _normalize(
    x, weight_ptr, cols, mask, EPS: tl.constexpr, OFFSET: tl.constexpr, DIM: tl.constexpr
):
    """Returns the RMSNorm of one row x :: [BLOCK], fp32."""
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
        return x * tl.rsqrt(tl.sum(x * x) / DIM + EPS) * add_offset(weight, OFFSET)
    else:
        return x * tl.rsqrt(tl.sum(x * x) / DIM + EPS)


@triton.jit
def _rms_norm_kernel(
    x_ptr,  # [rows, DIM]
    residual_ptr,  # [rows, DIM] | None
    weight_ptr,  # [DIM] | None
    post_weight_ptr,  # [DIM] | None
    layer_scalar_ptr,  # [1] | None
    residual_weight_ptr,  # [DIM] | None
    out_ptr,  # [rows, DIM], contiguous | None: only h is computed
    h_ptr,  # [rows, DIM], contiguous | None
    x_row_stride,
    residual_row_stride,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,  # DIM rounded up to a power of two
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # int64: row * DIM passes 2**31 on long batches
    cols = tl.arange(0, BLOCK)  # [BLOCK]
    mask = cols < DIM
    dtype = x_ptr.dtype.element_ty
    if PDL:
        line = tl.minimum(tl.arange(0, (BLOCK + 31) // 32) * 32, DIM - 1)  # of 128 bytes in fp32
        if post_weight_ptr is not None:
            prefetch(post_weight_ptr + line)
        if residual_weight_ptr is not None:
            prefetch(residual_weight_ptr + line)
    wait_for_previous_kernel(PDL)

    x = tl.load(x_ptr + row * x_row_stride + cols, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * residual_row_stride + cols, mask=mask, other=0.0)
        if post_weight_ptr is not None:
            x = _normalize(x, post_weight_ptr, cols, mask, EPS, OFFSET, DIM)
            x = x.to(dtype).to(tl.float32)
        if residual_weight_ptr is not None:
            residual = residual.to(tl.float32)
            residual = _normalize(residual, residual_weight_ptr, cols, mask, EPS, OFFSET, DIM)
            residual = residual.to(dtype)
        h = (x + residual.to(tl.float32)).to(dtype)
        if layer_scalar_ptr is not None:
            h = (h.to(tl.float32) * tl.load(layer_scalar_ptr).to(tl.float32)).to(dtype)
        tl.store(h_ptr + row * DIM + cols, h, mask=mask)
        x = h.to(tl.float32)
    if out_ptr is not None:
        out = out_ptr + row * DIM + cols  # [BLOCK]
        tl.store(out, _normalize(x, weight_ptr, cols, mask, EPS, OFFSET, DIM), mask=mask)


def default_config(dim: int) -> dict[str, int]:
    """Returns the launch config: a block is a whole row."""
    block = triton.next_power_of_2(dim)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 8)}


class _Weights(NamedTuple):
    norm: Tensor | None
    post_norm: Tensor | None = None
    layer_scalar: Tensor | None = None
    residual: Tensor | None = None


def _check(
    x: Tensor, weight: Tensor | None, residual: Tensor | None = None,
    post_weight: Tensor | None = None, layer_scalar: Tensor | None = None,
    residual_weight: Tensor | None = None,
) -> None:  # fmt: skip
    """Asserts that shapes and dtypes fit together."""
    for w in (weight, post_weight, residual_weight):
        assert w is None or w.shape == x.shape[-1:], (
            f"weight {tuple(w.shape)} does not fit x {tuple(x.shape)}"
        )
    if residual is not None:
        assert residual.shape == x.shape and residual.dtype == x.dtype, (
            f"residual {tuple(residual.shape)} {residual.dtype} does not fit x {tuple(x.shape)}"
            f" {x.dtype}"
        )
    assert layer_scalar is None or layer_scalar.dtype == x.dtype, f"{layer_scalar.dtype=}"


def _launch(
    x: Tensor, residual: Tensor | None, weights: _Weights, eps: float, offset: float,
    normalizes: bool = True, pdl: bool = False,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Returns (y, h): y if `normalizes`, h if there is a residual."""
    dim = x.shape[-1]
    assert all(w is None or w.is_contiguous() for w in weights), "weights must be contiguous"
    assert x.stride(-1) == 1 and (residual is None or residual.stride(-1) == 1), (
        "rows must be contiguous"
    )
    rows = x.reshape(-1, dim)  # [rows, dim]
    out = h = None
    residual_row_stride = 0
    if normalizes:
        out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    if residual is not None:
        residual = residual.reshape(-1, dim)  # [rows, dim]
        h = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        residual_row_stride = residual.stride(0)

    if rows.shape[0]:
        _rms_norm_kernel[(rows.shape[0],)](
            rows, residual, *weights, out, h, rows.stride(0), residual_row_stride,
            EPS=eps, OFFSET=offset, DIM=dim, **launch_config("rms_norm", default_config(dim)),
            **gpu(x.device).pdl_options(pdl),
        )  # fmt: skip
    return None if out is None else out.view(x.shape), None if h is None else h.view(x.shape)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@op(fake=lambda x, *_, **__: _like(x))
def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6, offset: float = 1.0) -> Tensor:
    """Gemma's RMSNorm of the last axis. Runs the reference where Triton does not run."""
    _check(x, weight)
    if not runs_triton(x):
        if calls.runs_c(x):
            return calls.norm(x, weight, eps=eps, offset=offset)[0]
        return rms_norm_reference(x, weight, eps, offset).contiguous()
    y, _ = _launch(x, None, _Weights(weight), eps, offset)
    assert y is not None
    return y


@op(fake=lambda x, *_, **__: _like(x))
def add_norm(
    x: Tensor, residual: Tensor, post_weight: Tensor, eps: float = 1e-6, offset: float = 1.0,
    residual_weight: Tensor | None = None, pdl: bool = False,
) -> Tensor:  # fmt: skip
    """Adds x, normalized, to the residual, which is normalized if residual_weight is given. Returns
    h. Runs the reference where Triton does not run.

    pdl: start while the previous kernel, which writes x or the residual, still runs.
    """
    _check(x, None, residual, post_weight, None, residual_weight)
    if not runs_triton(x):
        if calls.runs_c(x):
            if residual_weight is not None:
                residual = calls.norm(residual, residual_weight, eps=eps, offset=offset)[0]
            parts = None, residual, post_weight
            return calls.norm(x, *parts, eps=eps, offset=offset, normalizes=False)[0]
        return add_norm_reference(
            x, residual, post_weight, eps, offset, residual_weight
        ).contiguous()
    weights = _Weights(None, post_weight, residual=residual_weight)
    _, h = _launch(x, residual, weights, eps, offset, normalizes=False, pdl=pdl)
    assert h is not None
    return h


@op(fake=lambda x, *_, **__: (_like(x), _like(x)))
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, post_weight: Tensor | None = None,
    eps: float = 1e-6, offset: float = 1.0, layer_scalar: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Adds x, normalized if post_weight is given, to the residual, multiplies the sum by
    layer_scalar if given, and normalizes the result. Returns (y, h). Runs the reference where
    Triton does not run."""
    parts = weight, residual, post_weight, layer_scalar
    _check(x, *parts)
    if not runs_triton(x):
        if calls.runs_c(x):
            y, h = calls.norm(x, *parts, eps=eps, offset=offset)
            assert h is not None
            return y, h
        y, h = add_rms_norm_reference(x, residual, weight, post_weight, eps, offset, layer_scalar)
        return y.contiguous(), h.contiguous()
    weights = _Weights(weight, post_weight, layer_scalar)
    out, total = _launch(x, residual, weights, eps, offset)
    assert out is not None and total is not None
    return out, total
