"""Embedding lookup, scaled.

    y = weight[ids] * scale

ids    :: [b, t], int64; below zero (a token that could not be sampled): row 0
weight :: [vocab, dim], bf16 | fp16 | fp32, or packed (packed.py)
y      :: [b, t, dim], weight.dtype, or `dtype` if the weight is packed

Gemma rounds its scale, sqrt(dim), to y's dtype before the multiplication, and so does this
kernel. The result is rounded once.
Bound by memory: bytes = 2 * y.numel() * itemsize. Walk-through step: embed.
"""

import functools

import torch
from torch import Tensor

from gemma_fast.kernels._op import op, wait_for_previous_kernel
from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels._weight import load_units
from gemma_fast.kernels.launch import gpu, launch_config, runs_triton
from gemma_fast.kernels.packed import Weight, take_rows


def embed_reference(ids: Tensor, weight: Weight, scale: float, dtype: torch.dtype) -> Tensor:
    return take_rows(weight, ids.clamp(min=0), dtype) * torch.tensor(scale, dtype=dtype)


@triton.jit
def _embed_kernel(
    ids_ptr,  # [tokens]
    weight,  # Weight [vocab, DIM]
    out_ptr,  # [tokens, DIM]
    SCALE: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,  # columns that share a scale; 0: not packed
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    cols = start + tl.arange(0, BLOCK)  # [BLOCK]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    wait_for_previous_kernel(PDL)
    row = tl.maximum(tl.load(ids_ptr + token), 0)
    if GROUP:
        col = (start + tl.arange(0, BLOCK // 16) * 16)[None, :]  # [1, BLOCK / 16]
        hidden = load_units(weight, row, col, col < DIM, DIM, GROUP, 16)  # [1, BLOCK]
        hidden = hidden.reshape([BLOCK]).to(dtype)  # [BLOCK]
    else:
        hidden = tl.load(weight.data + row * DIM + cols, mask=cols < DIM)
    tl.store(out_ptr + token * DIM + cols, hidden.to(tl.float32) * SCALE, mask=cols < DIM)


@functools.cache
def _rounded(scale: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(scale, dtype=dtype))


def default_config(weight: Weight) -> dict[str, int]:
    """Returns the launch config. A thread reads 16 columns of a packed weight, else 8."""
    block = min(triton.next_power_of_2(weight.shape[1]), 1024)
    return {"BLOCK": block, "num_warps": 4 if weight.scale is None else max(block // 512, 1)}


def _fake(
    ids: Tensor, weight: Tensor, scale: float, *, dtype: torch.dtype | None = None,
    weight_scale: Tensor | None = None, **_: object,
) -> Tensor:  # fmt: skip
    dim = Weight(weight, weight_scale).shape[1]
    return weight.new_empty(*ids.shape, dim, dtype=dtype or weight.dtype)


@op(fake=_fake)
def embed(
    ids: Tensor, weight: Tensor, scale: float, *, dtype: torch.dtype | None = None,
    weight_scale: Tensor | None = None, weight_minimum: Tensor | None = None, pdl: bool = False,
) -> Tensor:  # fmt: skip
    """Returns the scaled rows of the table, contiguous. Runs the reference where Triton does not
    run.

    dtype: of the result; required for a PackedWeight
    pdl: start while the previous kernel, which may write ids, still runs; then wait for it.
    """
    assert ids.dtype == torch.int64 and weight.is_contiguous()
    packed = Weight(weight, weight_scale, weight_minimum)
    dtype = dtype or weight.dtype
    assert dtype.is_floating_point, "a packed weight needs dtype"
    if not runs_triton(weight):
        return embed_reference(ids, packed, scale, dtype)
    ids, dim = ids.contiguous(), packed.shape[1]
    out = torch.empty(*ids.shape, dim, dtype=dtype, device=weight.device)
    config = launch_config("embed", default_config(packed))
    if out.numel():
        _embed_kernel[(ids.numel(), triton.cdiv(dim, config["BLOCK"]))](
            ids, packed, out,
            SCALE=_rounded(scale, dtype), DIM=dim, GROUP=packed.group,
            **config, **gpu(weight.device).pdl_options(pdl),
        )  # fmt: skip
    return out
