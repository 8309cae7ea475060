"""Per-layer inputs of Gemma 4 E2B and E4B: each token's projected embedding, normalized for each
layer, plus the layers' embeddings of the token.

    y = (rms_norm(projected * scale, norm_weight) + table[ids] * sqrt(p)) / sqrt(2)

projected   :: [b, t, layers * p], bf16 | fp16 | fp32; scale is 1 / sqrt(hidden)
ids         :: [b, t], int64; below zero (a token that could not be sampled): row 0
table       :: [vocab, layers * p], projected.dtype, or packed (packed.py); may be in pinned host
               memory
norm_weight :: [p], any float; offset as in rmsnorm.py
y           :: [b, t, layers, p], projected.dtype

The table has billions of parameters, of which a token needs one row. A GPU reads rows of pinned
host memory directly, over PCIe, so the table need not take GPU memory.
Computed in fp32 and rounded once. (Transformers rounds after each step.)
Bound by memory: bytes = 3 * y.numel() * itemsize.
"""

import math

import torch
from torch import Tensor

from gemma_fast.kernels._op import op, wait_for_previous_kernel
from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels._weight import load_units
from gemma_fast.kernels.launch import gpu, launch_config, runs_triton
from gemma_fast.kernels.packed import Weight, take_rows
from gemma_fast.kernels.rmsnorm import add_offset, rms_norm_reference


def per_layer_inputs_reference(
    projected: Tensor, ids: Tensor, table: Weight, norm_weight: Tensor, scale: float,
    eps: float = 1e-6, offset: float = 1.0,
) -> Tensor:  # fmt: skip
    p = norm_weight.shape[0]
    ids = ids.clamp(min=0).to(table.data.device)
    rows = take_rows(table, ids, torch.float32).to(projected.device)
    x, rows = (z.float().unflatten(-1, (-1, p)) for z in (projected, rows))  # [b, t, layers, p]
    y = rms_norm_reference(x * scale, norm_weight, eps, offset) + rows * p**0.5
    return (y * 0.5**0.5).to(projected.dtype)


@triton.jit(do_not_specialize=["rows"])
def _per_layer_inputs_kernel(
    projected_ptr,  # [rows, DIM]; a row is one layer of one token
    ids_ptr,  # [rows / LAYERS]
    table,  # Weight [vocab, LAYERS * DIM]
    norm_weight_ptr,  # [DIM]
    out_ptr,  # [rows, DIM]
    rows,
    SCALE: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    LAYERS: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,  # columns that share a scale; 0: not packed
    UNIT: tl.constexpr,  # neighboring columns of a packed table that a thread loads
    BLOCK: tl.constexpr,  # DIM rounded up to a power of two
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    cols = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    mask = (row < rows)[:, None] & (cols < DIM)  # [BLOCK_R, BLOCK]
    token = tl.maximum(tl.load(ids_ptr + row // LAYERS, mask=row < rows, other=0), 0)  # [BLOCK_R]
    if GROUP:
        unit = tl.arange(0, BLOCK // UNIT)[None, :] * UNIT  # [1, UNITS]
        col = (row % LAYERS * DIM)[:, None] + unit  # [BLOCK_R, UNITS]
        inside = (row < rows)[:, None] & (unit < DIM)  # [BLOCK_R, UNITS]
        # [BLOCK_R, BLOCK]
        embedding = load_units(table, token[:, None], col, inside, LAYERS * DIM, GROUP, UNIT)
    else:
        # [BLOCK_R, 1]: row of the table as [vocab * LAYERS, DIM]
        layer = (token * LAYERS + row % LAYERS)[:, None]
        embedding = tl.load(table.data + layer * DIM + cols, mask=mask, other=0.0)
    norm_weight = tl.load(norm_weight_ptr + cols, mask=cols < DIM, other=0.0)  # [1, BLOCK]
    wait_for_previous_kernel(PDL)

    place = row.to(tl.int64)[:, None] * DIM + cols  # [BLOCK_R, BLOCK]
    x = tl.load(projected_ptr + place, mask=mask, other=0.0).to(tl.float32) * SCALE
    square = tl.sum(x * x, axis=1, keep_dims=True) / DIM  # [BLOCK_R, 1]
    y = x * tl.rsqrt(square + EPS) * add_offset(norm_weight, OFFSET)  # [BLOCK_R, BLOCK]
    y += embedding.to(tl.float32) * DIM**0.5
    tl.store(out_ptr + place, y * 0.5**0.5, mask=mask)


def default_config(p: int) -> dict[str, int]:
    """Returns the launch config: a thread loads 16 bytes of each of four rows."""
    block = triton.next_power_of_2(p)
    return {"BLOCK": block, "BLOCK_R": 4, "num_warps": min(max(block // 256, 1), 8)}


def _fake(
    projected: Tensor, ids: Tensor, table: Tensor, norm_weight: Tensor, **_: object
) -> Tensor:
    p = norm_weight.shape[0]
    return projected.new_empty(*projected.shape[:-1], projected.shape[-1] // p, p)


@op(fake=_fake)
def per_layer_inputs(
    projected: Tensor, ids: Tensor, table: Tensor, norm_weight: Tensor, *, scale: float,
    eps: float = 1e-6, offset: float = 1.0, table_scale: Tensor | None = None,
    table_minimum: Tensor | None = None, pdl: bool = False,
) -> Tensor:  # fmt: skip
    """Returns the per-layer inputs, contiguous. Runs the reference where Triton does not run.

    pdl: start reading ids and table while the previous kernel, which writes `projected`, still
    runs. No running kernel may write ids.
    """
    p, dim = norm_weight.shape[0], projected.shape[-1]
    assert ids.dtype == torch.int64 and ids.shape == projected.shape[:-1], f"{ids.shape=}"
    packed = Weight(table, table_scale, table_minimum)
    assert packed.shape[1] == dim and dim % p == 0, f"{packed.shape=}, {projected.shape=}, {p=}"
    assert table_scale is not None or table.dtype == projected.dtype, f"{table.dtype=}"
    if not runs_triton(projected):
        return per_layer_inputs_reference(
            projected, ids, packed, norm_weight, scale, eps, offset
        ).contiguous()
    assert table.is_contiguous() and norm_weight.stride(0) == 1
    pdl = pdl and ids.is_contiguous()  # the copy would be written by a running kernel
    x, ids = projected.contiguous(), ids.contiguous()
    rows = x.numel() // p
    out = torch.empty((*ids.shape, dim // p, p), dtype=x.dtype, device=x.device)
    config = launch_config("per_layer_inputs", default_config(p))
    if rows:
        _per_layer_inputs_kernel[(triton.cdiv(rows, config["BLOCK_R"]),)](
            x, ids, packed, norm_weight, out, rows,
            SCALE=scale, EPS=eps, OFFSET=offset, LAYERS=dim // p, DIM=p, GROUP=packed.group,
            UNIT=math.gcd(p, 16),
            **config, **gpu(x.device).pdl_options(pdl),
        )  # fmt: skip
    return out
