"""The order in which programs compute the tiles of a matmul's output."""

from gemma_fast.kernels._triton import tl, triton


@triton.jit
def tile_at(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Returns row and column of a tile, counted in tiles. GROUP_M tiles of rows follow one another
    with the same columns, so that they share weights in the L2 cache."""
    group = tile // (GROUP_M * tiles_n) * GROUP_M
    group_m = tl.minimum(tiles_m - group, GROUP_M)
    row = group + tile % (GROUP_M * tiles_n) % group_m
    return row, tile % (GROUP_M * tiles_n) // group_m
