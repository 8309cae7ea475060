"""What the kernels of a decode step share: a weight times a few rows, normalised on the way.

The weight is read once. Each program takes some rows of it, and all of x, whose norm is one number
a row. One row is multiplied elementwise, more by the tensor cores.
"""

import torch
from torch import Tensor

from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels.launch import runs_triton

MAX_ROWS = 8


@triton.jit
def _load_stream(
    x_ptr, residual_ptr, post_norm_weight_ptr, post_scale, row, col, mask,
    DIM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_POST_NORM: tl.constexpr,
):  # fmt: skip
    """h at [row, col], rounded, in fp32."""
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * DIM + col, mask=mask, other=0.0)
    if HAS_POST_NORM:
        weight = tl.load(post_norm_weight_ptr + col, mask=col < DIM, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) * post_scale * (1 + weight)).to(dtype)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * DIM + col, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(dtype)
    return x.to(tl.float32)


@triton.jit
def norm_scales(
    x_ptr, residual_ptr, post_norm_weight_ptr, sum_ptr, rows, first,
    EPS: tl.constexpr, DIM: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_POST_NORM: tl.constexpr,
):  # fmt: skip
    """1 / rms of h :: [BLOCK_B, 1], and of x if it has a norm; h is written if `first`."""
    BLOCK: tl.constexpr = BLOCK_K if BLOCK_K >= DIM else BLOCK_K * (4 if BLOCK_B == 1 else 2)
    row, offset = tl.arange(0, BLOCK_B)[:, None], tl.arange(0, BLOCK)[None, :]
    post_scale = tl.zeros([BLOCK_B, 1], tl.float32)
    if HAS_POST_NORM:
        for k in range(0, DIM, BLOCK):
            mask = (row < rows) & (k + offset < DIM)
            x = tl.load(x_ptr + row * DIM + k + offset, mask=mask, other=0.0).to(tl.float32)
            post_scale += tl.sum(x * x, axis=1, keep_dims=True)
        post_scale = tl.rsqrt(post_scale / DIM + EPS)
    scale = tl.zeros([BLOCK_B, 1], tl.float32)
    for k in range(0, DIM, BLOCK):
        mask = (row < rows) & (k + offset < DIM)
        h = _load_stream(
            x_ptr, residual_ptr, post_norm_weight_ptr, post_scale, row, k + offset, mask,
            DIM, HAS_RESIDUAL, HAS_POST_NORM,
        )  # fmt: skip
        scale += tl.sum(h * h, axis=1, keep_dims=True)
        if sum_ptr is not None:
            tl.store(sum_ptr + row * DIM + k + offset, h, mask=mask & first)
    return tl.rsqrt(scale / DIM + EPS), post_scale


@triton.jit
def load_weight(weight_ptr, row, k, DIM: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_N, BLOCK_K] of a weight, from column k on."""
    col = k + tl.arange(0, BLOCK_K)[None, :]
    pointer = weight_ptr + row.to(tl.int64)[:, None] * DIM + col
    if DIM % BLOCK_K == 0:
        return tl.load(pointer, eviction_policy="evict_first")
    else:
        return tl.load(pointer, mask=col < DIM, other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_x(
    x_ptr, residual_ptr, norm_weight_ptr, post_norm_weight_ptr, scale, post_scale, rows, k,
    DIM: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_POST_NORM: tl.constexpr,
):  # fmt: skip
    """[BLOCK_B, BLOCK_K]: what the weight is multiplied with, from column k on."""
    row, col = tl.arange(0, BLOCK_B)[:, None], k + tl.arange(0, BLOCK_K)[None, :]
    mask = (row < rows) & (col < DIM)
    if HAS_NORM:
        h = _load_stream(
            x_ptr, residual_ptr, post_norm_weight_ptr, post_scale, row, col, mask,
            DIM, HAS_RESIDUAL, HAS_POST_NORM,
        )  # fmt: skip
        norm_weight = tl.load(norm_weight_ptr + col, mask=col < DIM, other=0.0).to(tl.float32)
        return (h * scale * (1 + norm_weight)).to(x_ptr.dtype.element_ty)
    else:
        return tl.load(x_ptr + row * DIM + col, mask=mask, other=0.0)


@triton.jit
def _add_product(out, weight, x):
    """out + weight @ xᵀ; of one row, out is summed over a thread's columns only."""
    BLOCK_B: tl.constexpr = x.shape[0]
    if BLOCK_B == 1:
        products = weight.to(tl.float32) * x.to(tl.float32)
        split: tl.constexpr = [out.shape[0], out.shape[1], weight.shape[1] // out.shape[1]]
        return out + tl.sum(products.reshape(split), axis=2)
    else:
        return tl.dot(weight, x.T, out, input_precision="ieee")


@triton.jit
def first_weight(
    weight_ptr, row,
    DIM: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """The first block, on its way before the wait for the kernel ahead: with one row of x into
    registers; else, since tensor cores take it from shared memory, only into the L2 cache."""
    if BLOCK_B == 1:
        return load_weight(weight_ptr, row, 0, DIM, BLOCK_K)
    else:
        if PREFETCH:
            LINE: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth  # 128 bytes
            col = tl.minimum(tl.arange(0, BLOCK_K // LINE) * LINE, DIM - 1)[None, :]
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l",
                [weight_ptr + row.to(tl.int64)[:, None] * DIM + col],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        return row


@triton.jit
def product(
    weight, weight_ptr, weight_row,
    x_ptr, residual_ptr, norm_weight_ptr, post_norm_weight_ptr, scale, post_scale, rows,
    DIM: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_POST_NORM: tl.constexpr,
):  # fmt: skip
    """[rows of the weight, BLOCK_B] in fp32: they, of which first_weight gave `weight`, times x,
    normalised by norm_scales' scale and post_scale if HAS_NORM."""
    BLOCK_N: tl.constexpr = weight_row.shape[0]
    FIRST: tl.constexpr = BLOCK_K if BLOCK_B == 1 else 0  # column of the loop's first block
    VECTOR: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth  # of a thread's load
    COLS: tl.constexpr = BLOCK_K // VECTOR if BLOCK_B == 1 else BLOCK_B
    out = tl.zeros([BLOCK_N, COLS], tl.float32)
    if BLOCK_B == 1:
        first_x = _load_x(
            x_ptr, residual_ptr, norm_weight_ptr, post_norm_weight_ptr, scale, post_scale, rows, 0,
            DIM, BLOCK_B, BLOCK_K, HAS_NORM, HAS_RESIDUAL, HAS_POST_NORM,
        )  # fmt: skip
    for k in tl.range(FIRST, DIM, BLOCK_K, num_stages=STAGES):
        x = _load_x(
            x_ptr, residual_ptr, norm_weight_ptr, post_norm_weight_ptr, scale, post_scale, rows, k,
            DIM, BLOCK_B, BLOCK_K, HAS_NORM, HAS_RESIDUAL, HAS_POST_NORM,
        )  # fmt: skip
        out = _add_product(out, load_weight(weight_ptr, weight_row, k, DIM, BLOCK_K), x)
    if BLOCK_B == 1:  # the block in registers last: the others are on their way before
        out = tl.sum(_add_product(out, weight, first_x), axis=1, keep_dims=True)
    return out


def tile(rows: int, out: int, dim: int, itemsize: int) -> dict[str, int]:
    """Rows and columns of the weight at a time, and how many such blocks are under way at once."""
    if rows > 1:
        few = out <= 4096  # then each program keeps more under way
        return {
            "BLOCK_B": MAX_ROWS, "BLOCK_N": 16 if few or itemsize == 4 else 32,
            "BLOCK_K": 512 // itemsize, "STAGES": 6 if few else 3, "num_warps": 4,
        }  # fmt: skip
    line = dim * itemsize
    if 2048 < line <= 4096:  # a block is whole rows: all of them set out before the wait
        block = 4096
    else:  # the one that leaves fewer columns over
        block = min(2048, 1024, key=lambda block: (-line % block, -block))
    return {
        "BLOCK_B": 1, "BLOCK_N": 4 if out <= 4096 else 8, "BLOCK_K": block // itemsize,
        "STAGES": 4, "num_warps": min(block // 512, 4),
    }  # fmt: skip


def check_product(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor | None,
    post_norm_weight: Tensor | None, weight: Tensor,
) -> None:  # fmt: skip
    dim = weight.shape[1]
    assert x.shape[-1] == dim, f"{tuple(weight.shape)=} does not fit {tuple(x.shape)=}"
    for norm in (norm_weight, post_norm_weight):
        assert norm is None or norm.shape == (dim,), f"{tuple(norm.shape)=}, {tuple(x.shape)=}"
        assert norm is None or norm.stride(0) == 1, "a norm's weight must be contiguous"
    assert residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    assert residual is not None or post_norm_weight is None, "a post-norm needs a residual"


def is_matvec(x: Tensor, weight: Tensor) -> bool:
    """Whether x @ weightᵀ is for these kernels."""
    if not runs_triton(x) or not 0 < x[..., 0].numel() <= MAX_ROWS:
        return False
    assert x.dtype == weight.dtype and weight.is_contiguous(), f"{x.dtype=}, {weight.dtype=}"
    one_row = x.numel() == x.shape[-1]
    assert x.is_cuda or one_row or x.dtype != torch.bfloat16, (
        "the interpreter multiplies bf16 as integers"
    )
    return True
