"""The products of decoding: few rows of activations, and every weight read once.

    linear       y = x @ weightᵀ
    norm_linear  h = residual + x, or in Gemma 2 and 3 residual + rms_norm(x, post_norm_weight)
                 y = rms_norm(h, norm_weight) @ weightᵀ; with geglu: gelu(gate) * up of its halves

x, residual      :: [..., dim], bf16 | fp16 | fp32; without residual h = x
weight           :: [out, dim], x.dtype
norm_weight      :: [dim], any float; post_norm_weight :: the same, or None
y                :: [..., out], with geglu [..., out / 2]; h :: [..., dim]; both x.dtype

The norm, h and the normalised row are rounded as rmsnorm.py rounds them, sums are in fp32. Up to
MAX_ROWS rows are one launch: each program reads all of x, whose norm is one number, and some rows
of the weight; the first writes h. Its first weights are on their way before the kernel ahead is
done (prefetch). One row is multiplied elementwise, more by the tensor cores. Above MAX_ROWS, the
norm, the library's product and geglu follow each other.
Bound by memory: bytes = weight.numel() * itemsize. Walk-through steps: project to Q, K, V; MLP.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_fast.kernels._op import gpu, op, wait_for_kernel_ahead
from gemma_fast.kernels._triton import knobs, tl, triton
from gemma_fast.kernels.geglu import geglu as geglu_of
from gemma_fast.kernels.geglu import geglu_tile
from gemma_fast.kernels.rmsnorm import add_rms_norm, rms_norm

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
    BLOCK: tl.constexpr = 4 * BLOCK_K if BLOCK_B == 1 else 2 * BLOCK_K
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
    """[BLOCK_N, BLOCK_K] of a weight; read once, it need not stay in the cache."""
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
def product(
    weight, weight_ptr, weight_row,
    x_ptr, residual_ptr, norm_weight_ptr, post_norm_weight_ptr, scale, post_scale, rows,
    DIM: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_POST_NORM: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_B] in fp32: rows of the weight, of which the first block of columns is
    `weight`, times x, normalised by norm_scales' scale and post_scale if HAS_NORM."""
    BLOCK_N: tl.constexpr = weight.shape[0]
    VECTOR: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth  # of a thread's load
    if BLOCK_B == 1:
        out = tl.zeros([BLOCK_N, BLOCK_K // VECTOR], tl.float32)
        first_x = _load_x(
            x_ptr, residual_ptr, norm_weight_ptr, post_norm_weight_ptr, scale, post_scale, rows, 0,
            DIM, BLOCK_B, BLOCK_K, HAS_NORM, HAS_RESIDUAL, HAS_POST_NORM,
        )  # fmt: skip
    else:
        out = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    # The first block, which lies in registers, is multiplied last: the others set out before.
    for k in tl.range(BLOCK_K, DIM, BLOCK_K, num_stages=STAGES):
        x = _load_x(
            x_ptr, residual_ptr, norm_weight_ptr, post_norm_weight_ptr, scale, post_scale, rows, k,
            DIM, BLOCK_B, BLOCK_K, HAS_NORM, HAS_RESIDUAL, HAS_POST_NORM,
        )  # fmt: skip
        out = _add_product(out, load_weight(weight_ptr, weight_row, k, DIM, BLOCK_K), x)
    if BLOCK_B > 1:  # not before: it would take registers that the loop needs
        first_x = _load_x(
            x_ptr, residual_ptr, norm_weight_ptr, post_norm_weight_ptr, scale, post_scale, rows, 0,
            DIM, BLOCK_B, BLOCK_K, HAS_NORM, HAS_RESIDUAL, HAS_POST_NORM,
        )  # fmt: skip
    out = _add_product(out, weight, first_x)
    if BLOCK_B == 1:
        out = tl.sum(out, axis=1, keep_dims=True)
    return out


@triton.jit(do_not_specialize=["rows"])
def _matvec_kernel(
    x_ptr,  # [rows, DIM]
    residual_ptr,  # [rows, DIM] | None
    norm_weight_ptr,  # [DIM] | None
    post_norm_weight_ptr,  # [DIM] | None
    weight_ptr,  # [OUT, DIM], with GEGLU [2 * OUT, DIM]
    out_ptr,  # [rows, OUT]
    sum_ptr,  # [rows, DIM] | None
    rows,
    EPS: tl.constexpr,
    DIM: tl.constexpr,
    OUT: tl.constexpr,
    GEGLU: tl.constexpr,
    BLOCK_B: tl.constexpr,  # rows, rounded up
    BLOCK_N: tl.constexpr,  # rows of the weight; with GEGLU half of them gate, half up
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,  # blocks under way at once, and one ahead of all
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_POST_NORM: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    COLS: tl.constexpr = BLOCK_N // 2 if GEGLU else BLOCK_N  # of the output
    program, n = tl.program_id(0), tl.arange(0, BLOCK_N)
    weight_row = (program * COLS + n % COLS) % OUT + n // COLS * OUT
    weight = load_weight(weight_ptr, weight_row, 0, DIM, BLOCK_K)
    wait_for_kernel_ahead(PREFETCH)
    scale, post_scale = 0.0, 0.0
    if HAS_NORM:
        scale, post_scale = norm_scales(
            x_ptr, residual_ptr, post_norm_weight_ptr, sum_ptr, rows, program == 0,
            EPS, DIM, BLOCK_B, BLOCK_K, HAS_RESIDUAL, HAS_POST_NORM,
        )  # fmt: skip
    out = product(
        weight, weight_ptr, weight_row,
        x_ptr, residual_ptr, norm_weight_ptr, post_norm_weight_ptr, scale, post_scale, rows,
        DIM, BLOCK_B, BLOCK_K, STAGES, HAS_NORM, HAS_RESIDUAL, HAS_POST_NORM,
    )  # fmt: skip
    if GEGLU:
        gate, up = out.reshape([2, COLS, BLOCK_B]).permute(1, 2, 0).split()
        out = geglu_tile(gate, up)
    col, row = program * COLS + tl.arange(0, COLS)[:, None], tl.arange(0, BLOCK_B)[None, :]
    tl.store(out_ptr + row * OUT + col, out, mask=(col < OUT) & (row < rows))


def tile(rows: int, out: int, dim: int, itemsize: int) -> dict[str, int]:
    """Rows and columns of the weight at a time, and how many such blocks. 64 to 128 bytes a thread
    are under way before the first is used, in programs enough for every multiprocessor."""
    if rows > 1:
        block_n = 32 if out > 4096 and itemsize == 2 else 16
        return {
            "BLOCK_B": MAX_ROWS,
            "BLOCK_N": block_n,
            "BLOCK_K": 512 // itemsize,
            "STAGES": 3,
            "num_warps": 4,
        }
    wide = 16384 // itemsize
    # The block that leaves fewer columns over; 512 bytes of a row for each warp.
    block_k = min(wide // 8, wide // 16, key=lambda block: (-dim % block, -block))
    block_n = 4 if out <= 4096 else 8
    num_warps = block_k * itemsize // 512
    return {
        "BLOCK_B": 1,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "STAGES": 4,
        "num_warps": num_warps,
    }


def _launch(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor | None,
    post_norm_weight: Tensor | None, weight: Tensor, geglu: bool, eps: float, prefetch: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    out_dim, dim = weight.shape[0] // (1 + geglu), weight.shape[1]
    assert x.dtype == weight.dtype, f"{x.dtype=}, {weight.dtype=}"
    assert weight.is_contiguous()
    flat = x.reshape(-1, dim).contiguous()
    rows = flat.shape[0]
    assert x.is_cuda or rows == 1 or x.dtype != torch.bfloat16, (
        "the interpreter multiplies bf16 as integers"
    )
    out = torch.empty((rows, out_dim), dtype=x.dtype, device=x.device)
    total = None if norm_weight is None else torch.empty_like(flat)
    if residual is not None:
        residual = residual.reshape(-1, dim).contiguous()
    blocks = tile(rows, weight.shape[0], dim, x.element_size())
    _matvec_kernel[(triton.cdiv(out_dim, blocks["BLOCK_N"] // (1 + geglu)),)](
        flat, residual, norm_weight, post_norm_weight, weight, out, total, rows,
        EPS=eps, DIM=dim, OUT=out_dim, GEGLU=geglu,
        HAS_NORM=norm_weight is not None, HAS_RESIDUAL=residual is not None,
        HAS_POST_NORM=post_norm_weight is not None, **blocks, **gpu(x.device).overlap(prefetch),
    )  # fmt: skip
    return out.view(*x.shape[:-1], out_dim), None if total is None else total.view(x.shape)


def is_matvec(x: Tensor, dim: int) -> bool:
    return (x.is_cuda or bool(knobs.runtime.interpret)) and 0 < x.numel() <= MAX_ROWS * dim


@op(fake=lambda x, weight, **_: x.new_empty(*x.shape[:-1], weight.shape[0]))
def linear(x: Tensor, weight: Tensor, *, prefetch: bool = False) -> Tensor:
    """x @ weightᵀ. Off the GPU, and for more than MAX_ROWS rows, PyTorch's product.

    prefetch: weights that no kernel is still writing may be read while the kernel ahead runs.
    """
    dim = weight.shape[1]
    assert x.shape[-1] == dim, f"{tuple(weight.shape)=} does not fit {tuple(x.shape)=}"
    if is_matvec(x, dim):
        return _launch(x, None, None, None, weight, False, 0.0, prefetch)[0]
    if x.is_cpu and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # F.linear takes MKL's product, which reads weights 2.6 times slower on an AMD processor
        # (benchmarks/LOG.md); this is oneDNN's, as Inductor calls it.
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    # One matrix: of a strided batch F.linear makes a batched product and copies the weights.
    return F.linear(x.reshape(-1, dim), weight).view(*x.shape[:-1], -1)


def _fake_norm_linear(
    x: Tensor, *args: Tensor, geglu: bool = False, **_: object
) -> tuple[Tensor, Tensor]:
    out = args[-1].shape[0] // (1 + geglu)
    return x.new_empty(*x.shape[:-1], out), x.new_empty(x.shape)


@op(fake=_fake_norm_linear)
def norm_linear(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, post_norm_weight: Tensor | None,
    weight: Tensor, *, geglu: bool = False, eps: float = 1e-6, prefetch: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, h), see above. Off the GPU, and for more than MAX_ROWS rows, step by step.

    prefetch: weights that no kernel is still writing may be read while the kernel ahead runs.
    """
    dim = weight.shape[1]
    assert norm_weight.shape == (dim,) == x.shape[-1:], (
        f"{tuple(weight.shape)=}, {tuple(norm_weight.shape)=}, {tuple(x.shape)=}"
    )
    assert residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    assert residual is not None or post_norm_weight is None, "a post-norm needs a residual"
    if is_matvec(x, dim):
        y, h = _launch(
            x, residual, norm_weight, post_norm_weight, weight, geglu, eps, prefetch
        )  # fmt: skip
        assert h is not None
        return y, h
    if residual is None:
        normed, h = rms_norm(x, norm_weight, eps), x.clone(memory_format=torch.contiguous_format)
    else:
        normed, h = add_rms_norm(x, residual, norm_weight, post_norm_weight, eps)
    y = linear(normed, weight)
    return geglu_of(y) if geglu else y, h
