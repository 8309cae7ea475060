"""Rows of x sorted by expert, and the tiles of a grouped matmul.

A pair is a row of x and one of its top_k slots. Its number is row * top_k + slot. Each tile has
pairs of one expert.
"""

import torch
from torch import Tensor

from gemma_fast.kernels._tiles import tile_at
from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels.launch import launch_config


@triton.jit(do_not_specialize=["pairs"])
def _sort_pairs_kernel(
    chosen_ptr,  # [pairs], contiguous
    order_ptr,  # [pairs]
    first_ptr,  # [experts + 1]: position in order of each expert's first pair
    pairs,
    BLOCK: tl.constexpr,
):
    """A program writes the pairs of one expert. The last program has no pairs, only a first
    position: the number of pairs."""
    expert = tl.program_id(0)
    before = tl.zeros([BLOCK], tl.int32)
    for i in range(0, pairs, BLOCK):
        pair = i + tl.arange(0, BLOCK)  # [BLOCK]
        chosen = tl.load(chosen_ptr + pair, mask=pair < pairs, other=expert)  # [BLOCK]
        before += (chosen < expert).to(tl.int32)
    position = tl.sum(before)
    tl.store(first_ptr + expert, position)
    for i in range(0, pairs, BLOCK):
        pair = i + tl.arange(0, BLOCK)  # [BLOCK]
        chosen = tl.load(chosen_ptr + pair, mask=pair < pairs, other=-1)  # [BLOCK]
        own = (chosen == expert).to(tl.int32)  # [BLOCK]
        tl.store(order_ptr + position + tl.cumsum(own) - 1, pair, mask=own != 0)
        position += tl.sum(own)


def sort_pairs(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Sorts the pairs by expert, and those of an expert by number. Returns (order, first), see
    _sort_pairs_kernel. The order depends on `chosen` only, and is computed without the host."""
    pairs = chosen.numel()
    order = torch.empty(pairs, dtype=torch.int32, device=chosen.device)
    first = torch.empty(experts + 1, dtype=torch.int32, device=chosen.device)
    config = launch_config("sort_pairs", {"BLOCK": 1024, "num_warps": 4})  # one for all lengths
    _sort_pairs_kernel[(experts + 1,)](chosen, order, first, pairs, **config)
    return order, first


@triton.jit
def expert_tile(first_ptr, tiles_n, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Returns the expert of this program's tile, and the tile's number among those of the expert.
    Tiles are numbered expert by expert. A program that has no tile gets an expert >= EXPERTS."""
    index = tl.arange(0, triton.next_power_of_2(EXPERTS))  # [experts]
    first = tl.load(first_ptr + index, mask=index < EXPERTS, other=0)  # [experts]
    end = tl.load(first_ptr + index + 1, mask=index < EXPERTS, other=0)
    # Number of tiles up to the end of each expert.
    tiles = tl.cumsum(tl.cdiv(end - first, BLOCK_M) * tiles_n)  # [experts]
    before = tiles <= tl.program_id(0)  # [experts]
    return tl.sum(before.to(tl.int32)), tl.program_id(0) - tl.max(tl.where(before, tiles, 0))


@triton.jit
def tile_rows(first_ptr, expert, tile, tiles_n, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """Returns a tile's positions in order, [BLOCK_M], which of them the expert has, and the tile's
    columns, counted in tiles."""
    first, end = tl.load(first_ptr + expert), tl.load(first_ptr + expert + 1)
    tile_m, tile_n = tile_at(tile, tl.cdiv(end - first, BLOCK_M), tiles_n, GROUP_M)
    position = first + tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    return position, position < end, tile_n
