"""The input of a decode step's matmul. While x is loaded, it is added to the residual stream,
normalized and rounded as in rmsnorm.py; without norms, the input is x itself. Each program loads
whole rows of x, because the norms need them."""

from typing import Any, NamedTuple

from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels.rmsnorm import add_offset


class MatmulInput(NamedTuple):
    """Pointers to the residual stream and its norms. The matmul's input is rms_norm(h, norm_weight)
    with h = layer_scalar * (residual + rms_norm(x, post_norm_weight))."""

    x: Any  # [rows, DIM], contiguous: the previous layer's output
    residual: Any  # [rows, DIM], contiguous | None: h = x
    norm_weight: Any  # [DIM] | None: the matmul's input is h, or x if there is no post-norm
    post_norm_weight: Any  # [DIM] | None: h = residual + x
    layer_scalar: Any  # [1] | None


class Scales(NamedTuple):
    """Factors of rows, fp32. Those that the matmul's input does not need are 0."""

    norm: Any  # 1 / rms of h, [BLOCK_B, 1]
    post_norm: Any  # 1 / rms of x, [BLOCK_B, 1]
    layer_scalar: Any  # a number


@triton.jit
def load_h(inputs, scales, row, col, mask, OFFSET: tl.constexpr, DIM: tl.constexpr):
    """Computes h at row :: [BLOCK_B, 1] and col :: [1, cols], rounded to x's dtype. Returns it in
    fp32, [BLOCK_B, cols]."""
    dtype = inputs.x.dtype.element_ty
    x = tl.load(inputs.x + row * DIM + col, mask=mask, other=0.0)  # [BLOCK_B, cols]
    if inputs.post_norm_weight is not None:
        weight = tl.load(inputs.post_norm_weight + col, mask=col < DIM, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) * scales.post_norm * add_offset(weight, OFFSET)).to(dtype)
    if inputs.residual is not None:
        residual = tl.load(inputs.residual + row * DIM + col, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(dtype)
    if inputs.layer_scalar is not None:
        x = (x.to(tl.float32) * scales.layer_scalar).to(dtype)
    return x.to(tl.float32)


@triton.jit
def norm_scales(
    inputs,
    h_ptr,  # [rows, DIM] | None: no program stores h
    rows,
    stores_h,  # whether this program stores h
    EPS: tl.constexpr, OFFSET: tl.constexpr, DIM: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Returns the Scales of all rows. Stores h if there is a norm and stores_h is true."""
    BLOCK: tl.constexpr = BLOCK_K if BLOCK_K >= DIM else BLOCK_K * (4 if BLOCK_B == 1 else 2)
    row = tl.arange(0, BLOCK_B)[:, None]  # [BLOCK_B, 1]
    offset = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    post_scale = tl.zeros([BLOCK_B, 1], tl.float32)
    if inputs.post_norm_weight is not None:
        for k in range(0, DIM, BLOCK):
            mask = (row < rows) & (k + offset < DIM)  # [BLOCK_B, BLOCK]
            x = tl.load(inputs.x + row * DIM + k + offset, mask=mask, other=0.0).to(tl.float32)
            post_scale += tl.sum(x * x, axis=1, keep_dims=True)  # [BLOCK_B, 1]
        post_scale = tl.rsqrt(post_scale / DIM + EPS)
    layer_scalar = 0.0
    if inputs.layer_scalar is not None:
        layer_scalar = tl.load(inputs.layer_scalar).to(tl.float32)
    scale = tl.zeros([BLOCK_B, 1], tl.float32)
    scales = Scales(scale, post_scale, layer_scalar)
    if inputs.norm_weight is not None:
        for k in range(0, DIM, BLOCK):
            mask = (row < rows) & (k + offset < DIM)  # [BLOCK_B, BLOCK]
            h = load_h(inputs, scales, row, k + offset, mask, OFFSET, DIM)  # [BLOCK_B, BLOCK]
            scale += tl.sum(h * h, axis=1, keep_dims=True)  # [BLOCK_B, 1]
            if h_ptr is not None:
                tl.store(h_ptr + row * DIM + k + offset, h, mask=mask & stores_h)
        scale = tl.rsqrt(scale / DIM + EPS)
    return Scales(scale, post_scale, layer_scalar)


@triton.jit
def load_input(
    inputs, scales, h_ptr, rows, k,
    OFFSET: tl.constexpr, DIM: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Loads columns k … k + BLOCK_K - 1 of the matmul's input, normalized: [BLOCK_B, BLOCK_K], in
    x's dtype. If the input is h itself, program 0 stores these columns of h."""
    dtype = inputs.x.dtype.element_ty
    row = tl.arange(0, BLOCK_B)[:, None]  # [BLOCK_B, 1]
    col = k + tl.arange(0, BLOCK_K)[None, :]  # [1, BLOCK_K]
    mask = (row < rows) & (col < DIM)  # [BLOCK_B, BLOCK_K]
    if inputs.norm_weight is not None:
        h = load_h(inputs, scales, row, col, mask, OFFSET, DIM)  # [BLOCK_B, BLOCK_K]
        norm_weight = tl.load(inputs.norm_weight + col, mask=col < DIM, other=0.0).to(tl.float32)
        return (h * scales.norm * add_offset(norm_weight, OFFSET)).to(dtype)
    elif inputs.post_norm_weight is not None:
        # [BLOCK_B, BLOCK_K]
        h = load_h(inputs, scales, row, col, mask, OFFSET, DIM).to(dtype)
        tl.store(h_ptr + row * DIM + col, h, mask=mask & (tl.program_id(0) == 0))
        return h
    else:
        return tl.load(inputs.x + row * DIM + col, mask=mask, other=0.0)  # [BLOCK_B, BLOCK_K]
