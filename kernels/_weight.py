"""Loads parts of a weight."""

from gemma_fast.kernels._triton import tl, triton


@triton.jit
def load_weight(weight, row, k, DIM: tl.constexpr, BLOCK_K: tl.constexpr):
    """Loads columns k … k + BLOCK_K - 1 of rows :: [BLOCK_N] of the weight: [BLOCK_N, BLOCK_K]."""
    col = k + tl.arange(0, BLOCK_K)[None, :]  # [1, BLOCK_K]
    pointer = weight.data + row.to(tl.int64)[:, None] * DIM + col  # [BLOCK_N, BLOCK_K]
    if DIM % BLOCK_K == 0:
        return tl.load(pointer, eviction_policy="evict_first")  # [BLOCK_N, BLOCK_K]
    else:
        return tl.load(pointer, mask=col < DIM, other=0.0, eviction_policy="evict_first")
