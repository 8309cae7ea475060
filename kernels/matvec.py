"""The products of decoding: few rows of activations, and every weight read once.

    linear       y = x @ weightᵀ
    norm_linear  h = residual + x, or in Gemma 2 and 3 residual + rms_norm(x, post_norm_weight)
                 y = rms_norm(h, norm_weight) @ weightᵀ; with geglu: gelu(gate) * up of its halves

x, residual      :: [..., dim], bf16 | fp16 | fp32; without residual h = x
weight           :: [out, dim], x.dtype
norm_weight      :: [dim], any float; post_norm_weight :: the same, or None
y                :: [..., out], with geglu [..., out / 2]; h :: [..., dim]; both x.dtype

The norm, h and the normalised row are rounded as rmsnorm.py rounds them, sums are in fp32. Up to
MAX_ROWS rows (_product.py) are one launch: each program reads all of x, whose norm is one number a
row, and some rows of the weight; the first writes h. Its first weights are on their way before the
kernel ahead is done (prefetch). One row is multiplied elementwise, more by the tensor cores. Above
MAX_ROWS, the norm, the library's product and geglu follow each other.
Bound by memory: bytes = weight.numel() * itemsize. Walk-through steps: project to Q, K, V; MLP.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_fast.kernels._op import op, wait_for_previous_kernel
from gemma_fast.kernels._product import (
    check_product,
    first_weight,
    is_matvec,
    norm_scales,
    product,
    tile,
)
from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels.geglu import geglu as geglu_of
from gemma_fast.kernels.geglu import geglu_tile
from gemma_fast.kernels.launch import gpu, launch_config
from gemma_fast.kernels.rmsnorm import add_rms_norm, rms_norm


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
    weight = first_weight(weight_ptr, weight_row, DIM, BLOCK_B, BLOCK_K, PREFETCH)
    wait_for_previous_kernel(PREFETCH)
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


def _launch(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor | None,
    post_norm_weight: Tensor | None, weight: Tensor, geglu: bool, eps: float, prefetch: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    out_dim, dim = weight.shape[0] // (1 + geglu), weight.shape[1]
    flat = x.reshape(-1, dim).contiguous()
    rows = flat.shape[0]
    out = torch.empty((rows, out_dim), dtype=x.dtype, device=x.device)
    total = None if norm_weight is None else torch.empty_like(flat)
    if residual is not None:
        residual = residual.reshape(-1, dim).contiguous()
    blocks = launch_config("matvec", tile(rows, weight.shape[0], dim, x.element_size()))
    _matvec_kernel[(triton.cdiv(out_dim, blocks["BLOCK_N"] // (1 + geglu)),)](
        flat, residual, norm_weight, post_norm_weight, weight, out, total, rows,
        EPS=eps, DIM=dim, OUT=out_dim, GEGLU=geglu,
        HAS_NORM=norm_weight is not None, HAS_RESIDUAL=residual is not None,
        HAS_POST_NORM=post_norm_weight is not None, **blocks, **gpu(x.device).overlap(prefetch),
    )  # fmt: skip
    return out.view(*x.shape[:-1], out_dim), None if total is None else total.view(x.shape)


@op(fake=lambda x, weight, **_: x.new_empty(*x.shape[:-1], weight.shape[0]))
def linear(x: Tensor, weight: Tensor, *, prefetch: bool = False) -> Tensor:
    """x @ weightᵀ. Off the GPU, and for more than MAX_ROWS rows, PyTorch's product.

    prefetch: weights that no kernel is still writing may be read while the kernel ahead runs.
    """
    check_product(x, None, None, None, weight)
    if is_matvec(x, weight):
        return _launch(x, None, None, None, weight, False, 0.0, prefetch)[0]
    if x.is_cpu and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # F.linear takes MKL's product, which reads weights 2.6 times slower on an AMD processor
        # (benchmarks/LOG.md); this is oneDNN's, as Inductor calls it.
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    # One matrix: of a strided batch F.linear makes a batched product and copies the weights.
    rows = x.reshape(-1, x.shape[-1])
    return F.linear(rows, weight).view(*x.shape[:-1], weight.shape[0])


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
    check_product(x, residual, norm_weight, post_norm_weight, weight)
    if is_matvec(x, weight):
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
    return geglu_of(*y.chunk(2, dim=-1)) if geglu else y, h
