"""The chosen experts of a mixture of experts for prompts, and for more than MAX_ROWS rows.

    y      = sum over i of weight[i] * expert(chosen[i])
    expert = (gelu(gate) * up) @ downᵀ, with gate and up the halves of x @ gate_upᵀ

Shapes and dtypes are in experts.py. A pair is a row of x and one of its top_k slots. Four launches:

    order  = the pairs, sorted by expert                   :: [pairs]
    hidden = gelu(gate) * up of each pair, in this order   :: [pairs, width]
    terms  = hidden @ downᵀ, in the order of x             :: [rows, top_k, dim]
    y      = sum over the slots of weight * terms          :: [rows, dim]

A tile of a matmul has rows of one expert. So no row is dropped or padded, however the router
distributes them. hidden and terms are rounded to x.dtype: terms in fp32 would double the bytes that
the last two launches transfer. Sums are in fp32. No launch adds atomically, so the result has the
same bits every time.
Bound by compute for long prompts: FLOPs = 6 * pairs * width * dim; by memory for few rows: bytes =
those of the chosen experts. Walk-through step: MLP.
"""

import torch
from torch import Tensor

from gemma_fast.kernels._expert_tiles import expert_tile, sort_pairs, tile_rows
from gemma_fast.kernels._prompt_matmul import fitting_block, prompt_matmul
from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels.geglu import geglu_in_fp32
from gemma_fast.kernels.launch import Gpu, gpu, launch_config
from gemma_fast.kernels.packed import Weight


@triton.jit
def _grouped_gate_up_kernel(
    x_ptr,  # [rows, DIM], contiguous
    weight,  # Weight [EXPERTS * 2 * WIDTH, DIM]: of each expert gate, then up
    order_ptr,  # [rows * TOP_K]
    first_ptr,  # [EXPERTS + 1]
    out_ptr,  # [rows * TOP_K, WIDTH], contiguous
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,  # columns that share a scale; 0: not packed
    BLOCK_M: tl.constexpr,  # rows of x
    BLOCK_N: tl.constexpr,  # rows of the weight: half of them gate, half up
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,  # tiles of rows that share weights in the L2 cache
):
    tiles_n: tl.constexpr = (2 * WIDTH + BLOCK_N - 1) // BLOCK_N
    expert, tile = expert_tile(first_ptr, tiles_n, EXPERTS, BLOCK_M)
    if expert >= EXPERTS:
        return
    position, mask, tile_n = tile_rows(first_ptr, expert, tile, tiles_n, BLOCK_M, GROUP_M)
    x_row = tl.load(order_ptr + position, mask=mask, other=0) // TOP_K  # [BLOCK_M]
    x_ptr += x_row.to(tl.int64)[:, None] * DIM  # [BLOCK_M, 1]
    # Gate and up alternate every 8 rows: in the tensor cores' layout, a thread then has both.
    i = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    col = tile_n * (BLOCK_N // 2) + i // 16 * 8 + i % 8  # [BLOCK_N]: of gate and of up
    row = (expert * 2 + i // 8 % 2).to(tl.int64) * WIDTH + col % WIDTH  # [BLOCK_N]

    dtype: tl.constexpr = out_ptr.dtype.element_ty
    gate_up = prompt_matmul(weight, row, x_ptr, DIM, GROUP, BLOCK_K, dtype)  # [BLOCK_N, BLOCK_M]
    gate_up = gate_up.reshape([BLOCK_N // 16, 2, 8, BLOCK_M]).permute(0, 2, 3, 1)
    gate, up = gate_up.split()  # [BLOCK_N / 16, 8, BLOCK_M]
    hidden = geglu_in_fp32(gate, up).reshape([BLOCK_N // 2, BLOCK_M])  # [BLOCK_N / 2, BLOCK_M]
    col = tile_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)[:, None]  # [BLOCK_N / 2, 1]
    out = out_ptr + position.to(tl.int64)[None, :] * WIDTH + col  # [BLOCK_N / 2, BLOCK_M]
    tl.store(out, hidden, mask=mask[None, :] & (col < WIDTH))


@triton.jit
def _grouped_down_kernel(
    hidden_ptr,  # [rows * TOP_K, WIDTH], contiguous, in order
    weight,  # Weight [EXPERTS * DIM, WIDTH]
    order_ptr,  # [rows * TOP_K]
    first_ptr,  # [EXPERTS + 1]
    out_ptr,  # [rows * TOP_K, DIM], contiguous, not in order
    EXPERTS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,  # columns that share a scale; 0: not packed
    BLOCK_M: tl.constexpr,  # rows of hidden
    BLOCK_N: tl.constexpr,  # rows of the weight
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,  # tiles of rows that share weights in the L2 cache
):
    tiles_n: tl.constexpr = (DIM + BLOCK_N - 1) // BLOCK_N
    expert, tile = expert_tile(first_ptr, tiles_n, EXPERTS, BLOCK_M)
    if expert >= EXPERTS:
        return
    position, mask, tile_n = tile_rows(first_ptr, expert, tile, tiles_n, BLOCK_M, GROUP_M)
    # A position past the expert's last reads row 0, and its result is not stored.
    hidden_ptr += tl.where(mask, position, 0).to(tl.int64)[:, None] * WIDTH  # [BLOCK_M, 1]
    col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    row = expert.to(tl.int64) * DIM + col % DIM  # [BLOCK_N]

    dtype: tl.constexpr = out_ptr.dtype.element_ty
    y = prompt_matmul(weight, row, hidden_ptr, WIDTH, GROUP, BLOCK_K, dtype)  # [BLOCK_N, BLOCK_M]
    pair = tl.load(order_ptr + position, mask=mask, other=0)  # [BLOCK_M]
    out = out_ptr + pair.to(tl.int64)[None, :] * DIM + col[:, None]  # [BLOCK_N, BLOCK_M]
    tl.store(out, y, mask=mask[None, :] & (col < DIM)[:, None])


@triton.jit
def _weighted_sum_kernel(
    terms_ptr,  # [rows, TOP_K, DIM], contiguous
    weight_ptr,  # [rows, TOP_K], contiguous
    out_ptr,  # [rows, DIM], contiguous
    TOP_K: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    out = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(TOP_K):
        pair = row * TOP_K + i
        term = tl.load(terms_ptr + pair * DIM + col, mask=col < DIM, other=0.0)  # [BLOCK]
        out += tl.load(weight_ptr + pair) * term.to(tl.float32)
    tl.store(out_ptr + row * DIM + col, out, mask=col < DIM)


def default_config(rows: int, weight: Weight, itemsize: int, gpu: Gpu) -> dict[str, int]:
    """Returns the launch config of a matmul for a mean number of rows per expert: operands fit in
    shared memory, and no register is spilled. On Hopper, two programs fit in a multiprocessor, so
    that one computes while the other searches its rows or stores its result."""
    large = gpu.shared_memory > 200_000 and itemsize == 2
    # Most experts have up to 1.5 times the mean: one tile loads their weights once.
    block_m = max(triton.next_power_of_2(rows + rows // 2), 16)
    block_m = min(block_m, 32 if itemsize == 4 else 128)
    few = block_m <= 32  # bound by memory: narrow and long tiles have more bytes in flight
    stages, size = 3 if large and not few else 4, weight.data.element_size()
    block_n, block_k = 64 if few else 128, 64
    if few and large:
        block_k = 128
    elif (block_m == 128 and not large) or size == 4:  # registers would be spilled
        block_k = 32
    while stages * block_k * (block_m * itemsize + block_n * size) > gpu.shared_memory:
        block_k //= 2
    return {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": 8,
        "num_warps": 4 if few else 8, "num_stages": stages,
    }  # fmt: skip


def _tiling(
    name: str, pairs: int, experts: int, weight: Weight, x: Tensor
) -> tuple[tuple[int], dict[str, int]]:
    """Returns the grid of a matmul and its launch config. The grid has the largest number of tiles
    that any choice of experts needs."""
    config = default_config(triton.cdiv(pairs, experts), weight, x.element_size(), gpu(x.device))
    config = launch_config(name, config)
    if weight.scale is not None:
        config["BLOCK_K"] = fitting_block(weight, config["BLOCK_K"])
    block_m, used = config["BLOCK_M"], min(experts, pairs)
    tiles_m = (pairs + used * (block_m - 1)) // block_m  # each expert's last tile has 1 row or more
    return (tiles_m * triton.cdiv(weight.shape[0] // experts, config["BLOCK_N"]),), config


def grouped_experts(
    x: Tensor, gate_up: Weight, down: Weight, chosen: Tensor, weight: Tensor
) -> Tensor:
    """Returns y, as defined above. For the arguments, see experts.py."""
    dim, top_k = x.shape[-1], chosen.shape[-1]
    experts, width = down.shape[0] // dim, down.shape[1]
    assert gate_up.shape == (2 * experts * width, dim), f"{gate_up.shape=} {down.shape=}"
    assert x.is_cuda or x.dtype != torch.bfloat16, "the interpreter multiplies bf16 as integers"
    assert all(part is None or part.is_contiguous() for part in (*gate_up, *down))
    flat = x.reshape(-1, dim).contiguous()  # [rows, dim]
    if flat.data_ptr() % 16:  # 16-byte loads need an aligned address
        flat = flat.clone()
    pairs = len(flat) * top_k
    hidden = torch.empty((pairs, width), dtype=x.dtype, device=x.device)
    terms = torch.empty((pairs, dim), dtype=x.dtype, device=x.device)
    out = torch.empty((len(flat), dim), dtype=x.dtype, device=x.device)
    if pairs:
        order, first = sort_pairs(chosen.reshape(-1).contiguous(), experts)
        grid, config = _tiling("grouped_gate_up", pairs, experts, gate_up, x)
        _grouped_gate_up_kernel[grid](
            flat, gate_up, order, first, hidden, EXPERTS=experts, TOP_K=top_k, WIDTH=width,
            DIM=dim, GROUP=gate_up.group, **config,
        )  # fmt: skip
        grid, config = _tiling("grouped_down", pairs, experts, down, x)
        _grouped_down_kernel[grid](
            hidden, down, order, first, terms, EXPERTS=experts, DIM=dim, WIDTH=width,
            GROUP=down.group, **config,
        )  # fmt: skip
        block = min(triton.next_power_of_2(dim), 1024)
        config = launch_config("weighted_sum", {"BLOCK": block, "num_warps": max(block // 256, 1)})
        _weighted_sum_kernel[(len(flat), triton.cdiv(dim, block))](
            terms, weight.contiguous(), out, TOP_K=top_k, DIM=dim, **config
        )
    return out.view(x.shape)
