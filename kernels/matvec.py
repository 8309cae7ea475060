"""Matmuls of a decode step: few rows of activations, each weight read once.

    linear       y = x @ weightᵀ
    norm_linear  h = residual + x, or from Gemma 2 on residual + rms_norm(x, post_norm_weight);
                 in Gemma 4 h = layer_scalar * h
                 y = rms_norm(h, norm_weight) @ weightᵀ, without norm_weight h @ weightᵀ;
                 with geglu: gelu(gate) * up of its halves; with up: gelu(y) * up

x, residual      :: [..., dim], bf16 | fp16 | fp32; without residual h = x
weight           :: [out, dim], x.dtype, or packed (packed.py)
norm_weight      :: [dim], any float, or None if there is a post-norm; offset as in rmsnorm.py
post_norm_weight :: [dim], any float, or None
layer_scalar     :: [1], x.dtype, or None
up               :: [..., out], x.dtype, or None; rows may be strided
y                :: [..., out], with geglu [..., out / 2]; h :: [..., dim]; both x.dtype

The norm, h and the normalized row are rounded as in rmsnorm.py; sums are in fp32. Up to MAX_ROWS
rows are one launch: one row in registers (_gemv.py), 2 to 8 on tensor cores (_skinny.py). Each
program loads all of x and some rows of the weight; program 0 stores h. The elements of a packed
weight are exact for one row, and are rounded once to x.dtype for more rows. With `pdl`, the first
block of the weight is fetched before the wait for the previous kernel. More rows take three steps:
norm, matmul (PyTorch's, or packed_linear.py), GeGLU.
Bound by memory: bytes = weight.nbytes. Walk-through steps: project to Q, K, V; MLP.
"""

import torch
from torch import Tensor

from gemma_fast.kernels._gemv import default_config as gemv_config
from gemma_fast.kernels._matmul_input import MatmulInput
from gemma_fast.kernels._matvec_block import matvec_block
from gemma_fast.kernels._op import op
from gemma_fast.kernels._skinny import MAX_ROWS
from gemma_fast.kernels._skinny import default_config as skinny_config
from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels.cpu import calls
from gemma_fast.kernels.geglu import geglu as geglu_of
from gemma_fast.kernels.launch import gpu, launch_config, runs_triton
from gemma_fast.kernels.packed import Weight
from gemma_fast.kernels.packed_linear import packed_linear, torch_linear
from gemma_fast.kernels.rmsnorm import add_norm, add_rms_norm, rms_norm


@triton.jit(do_not_specialize=["rows"])
def _matvec_kernel(
    inputs,  # MatmulInput
    weight,  # Weight [OUT, DIM]; with GEGLU [2 * OUT, DIM], gate then up
    out_ptr,  # [rows, OUT]
    h_ptr,  # [rows, DIM] | None
    up_ptr,  # [rows, OUT] | None
    up_row_stride,  # None without up
    rows,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    DIM: tl.constexpr,
    OUT: tl.constexpr,
    GROUP: tl.constexpr,  # columns that share a scale; 0: the weight is not packed
    GEGLU: tl.constexpr,
    BLOCK_B: tl.constexpr,  # rows, rounded up to 1 or MAX_ROWS
    BLOCK_N: tl.constexpr,  # rows of the weight; with GEGLU half of them gate, half up
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,  # blocks in flight at once
    PDL: tl.constexpr,
):
    matvec_block(
        tl.program_id(0), inputs, weight, None, out_ptr, h_ptr, up_ptr, up_row_stride, rows,
        EPS, OFFSET, DIM, OUT, GROUP, GEGLU, BLOCK_B, BLOCK_N, BLOCK_K, STAGES, PDL,
    )  # fmt: skip


def default_config(rows: int, weight: Weight, itemsize: int) -> dict[str, int]:
    """Returns the launch config for `rows` rows of x, whose elements have `itemsize` bytes."""
    return gemv_config(weight, itemsize) if rows == 1 else skinny_config(weight, itemsize)


def check_matmul(inputs: MatmulInput, weight: Weight) -> None:
    """Asserts that shapes, dtypes and strides fit together."""
    x, residual, norm_weight, post_norm_weight, layer_scalar = inputs
    dim = weight.shape[1]
    assert x.shape[-1] == dim, f"{tuple(weight.shape)=} does not fit {tuple(x.shape)=}"
    data = weight.data
    assert weight.scale is not None or x.dtype == data.dtype, f"{x.dtype=}, weight {data.dtype}"
    assert data.device == x.device, f"x is on {x.device}, the weight on {data.device}"
    for norm in (norm_weight, post_norm_weight):
        assert norm is None or norm.shape == (dim,), f"{tuple(norm.shape)=}, {tuple(x.shape)=}"
        assert norm is None or norm.stride(0) == 1, "a norm's weight must be contiguous"
    assert residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    assert residual is not None or post_norm_weight is None, "a post-norm needs a residual"
    if layer_scalar is not None:
        assert layer_scalar.shape == (1,) and layer_scalar.dtype == x.dtype
        assert residual is not None and norm_weight is not None, (
            "layer_scalar needs a residual and a norm"
        )


def is_matvec(x: Tensor, weight: Weight) -> bool:
    """Whether a kernel for few rows computes x @ weightᵀ: Triton runs, and x has 1 to MAX_ROWS
    rows."""
    if not runs_triton(x) or not 0 < x[..., 0].numel() <= MAX_ROWS:
        return False
    assert weight.data.is_contiguous()
    one_row = x.numel() == x.shape[-1]
    assert x.is_cuda or one_row or x.dtype != torch.bfloat16, (
        "the interpreter multiplies bf16 as integers"
    )
    return True


def _launch(
    inputs: MatmulInput, weight: Weight, up: Tensor | None, geglu: bool, eps: float,
    offset: float, pdl: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    x, out_dim, dim = inputs.x, weight.shape[0] // (1 + geglu), weight.shape[1]
    flat = x.reshape(-1, dim).contiguous()  # [rows, dim]
    rows = flat.shape[0]
    out = torch.empty((rows, out_dim), dtype=x.dtype, device=x.device)
    normed = inputs.norm_weight is not None or inputs.post_norm_weight is not None
    h = torch.empty_like(flat) if normed else None
    residual, up_row_stride = inputs.residual, None
    if residual is not None:
        residual = residual.reshape(-1, dim).contiguous()  # [rows, dim]
    if up is not None:
        up = up.reshape(-1, out_dim)  # [rows, out]
        up_row_stride = up.stride(0)
    config = launch_config("matvec", default_config(rows, weight, x.element_size()))
    _matvec_kernel[(triton.cdiv(out_dim, config["BLOCK_N"] // (1 + geglu)),)](
        inputs._replace(x=flat, residual=residual), weight, out, h, up, up_row_stride, rows,
        EPS=eps, OFFSET=offset, DIM=dim, OUT=out_dim, GROUP=weight.group, GEGLU=geglu,
        **config, **gpu(x.device).pdl_options(pdl),
    )  # fmt: skip
    return out.view(*x.shape[:-1], out_dim), None if h is None else h.view(x.shape)


@op(fake=lambda x, weight, **_: x.new_empty(*x.shape[:-1], weight.shape[0]))
def linear(
    x: Tensor, weight: Tensor, *, weight_scale: Tensor | None = None,
    weight_minimum: Tensor | None = None, pdl: bool = False,
) -> Tensor:  # fmt: skip
    """Returns x @ weightᵀ. Where Triton does not run, and for more than MAX_ROWS rows, PyTorch's
    matmul or `packed_linear` computes it.

    weight: a tensor or a PackedWeight (which sets weight_scale and weight_minimum)
    pdl: start reading the weight while the previous kernel still runs. No running kernel may write
    the weight.
    """
    inputs = MatmulInput(x, None, None, None, None)
    packed = Weight(weight, weight_scale, weight_minimum)
    check_matmul(inputs, packed)
    if is_matvec(x, packed):
        return _launch(inputs, packed, None, False, 0.0, 1.0, pdl)[0]
    if calls.is_matvec(x, packed):
        return calls.matvec(x, packed)[0]
    if packed.scale is not None:
        return packed_linear(x, packed)
    return torch_linear(x, weight)


def _normalized(inputs: MatmulInput, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """Returns the matmul's input and h, computed by separate ops."""
    x, residual, norm_weight, post_norm_weight, layer_scalar = inputs
    if norm_weight is None:
        h = add_norm(x, residual, post_norm_weight, eps, offset)
        return h, h
    if residual is None:
        h = x.clone(memory_format=torch.contiguous_format)
        return rms_norm(x, norm_weight, eps, offset), h
    return add_rms_norm(x, residual, norm_weight, post_norm_weight, eps, offset, layer_scalar)


def _fake_norm_linear(
    x: Tensor, *args: Tensor, geglu: bool = False, **_: object
) -> tuple[Tensor, Tensor]:
    out = args[-1].shape[0] // (1 + geglu)
    return x.new_empty(*x.shape[:-1], out), x.new_empty(x.shape)


@op(fake=_fake_norm_linear)
def norm_linear(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor | None,
    post_norm_weight: Tensor | None, weight: Tensor, *, geglu: bool = False,
    up: Tensor | None = None, layer_scalar: Tensor | None = None, eps: float = 1e-6,
    offset: float = 1.0, weight_scale: Tensor | None = None,
    weight_minimum: Tensor | None = None, pdl: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns (y, h), as defined above. Where Triton does not run, and for more than MAX_ROWS rows,
    norm, matmul and GeGLU are separate ops.

    weight, pdl: as in linear.
    """
    inputs = MatmulInput(x, residual, norm_weight, post_norm_weight, layer_scalar)
    packed = Weight(weight, weight_scale, weight_minimum)
    check_matmul(inputs, packed)
    assert norm_weight is not None or post_norm_weight is not None, "without norms, call linear"
    if up is not None:
        assert not geglu and up.shape == (*x.shape[:-1], weight.shape[0]) and up.dtype == x.dtype, (
            f"{tuple(up.shape)=} {up.dtype=} does not fit {tuple(weight.shape)=} {geglu=}"
        )
        assert up.stride(-1) == 1, "rows must be contiguous"
    if is_matvec(x, packed):
        y, h = _launch(inputs, packed, up, geglu, eps, offset, pdl)
        assert h is not None
        return y, h
    if calls.is_matvec(x, packed):
        y, h = calls.matvec(
            x, packed, residual=residual, norm_weight=norm_weight,
            post_norm_weight=post_norm_weight, layer_scalar=layer_scalar, up=up, geglu=geglu,
            eps=eps, offset=offset,
        )  # fmt: skip
        assert h is not None
        return y, h
    normed, h = _normalized(inputs, eps, offset)
    y = linear(normed, weight, weight_scale=weight_scale, weight_minimum=weight_minimum)
    if geglu:
        return geglu_of(*y.chunk(2, dim=-1)), h
    return (y if up is None else geglu_of(y, up)), h
