"""Loads blocks of a weight.

A unit is what a thread loads of a packed weight at a time: 16 bytes, which have 16 columns in 8
bits and 32 in 4 bits. The columns of a unit are in one group, so they share a scale.
"""

from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels.packed import Weight


@triton.jit
def unit_of(weight) -> tl.constexpr:
    """Returns the columns of the weight in 16 bytes."""
    if weight.scale is None:
        return 128 // weight.data.dtype.element_ty.primitive_bitwidth
    else:
        return 16 if weight.data.dtype.element_ty == tl.int8 else 32


@triton.jit
def zero_of(weight) -> tl.constexpr:
    """Returns what is added to a packed weight's values in its data: 128 in 8 bits, once the sign
    bit is flipped."""
    BITS: tl.constexpr = 128 // unit_of(weight)
    return 128 if BITS == 8 else (8 if weight.minimum is None else 0)


@triton.jit
def load_weight(
    weight,  # Weight [out, DIM]
    row,  # [BLOCK_N]
    k,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,  # columns that share a scale; 0: not packed
    BLOCK_K: tl.constexpr,
):
    """Loads columns k … k + BLOCK_K - 1 of rows of the weight. Returns a Weight of values: its data
    is [BLOCK_N, BLOCK_K], or if packed, int32 words of units :: [BLOCK_N, UNITS, 4], with scale and
    minimum :: [BLOCK_N, groups] (see by_unit)."""
    row = row.to(tl.int64)[:, None]  # [BLOCK_N, 1]
    if weight.scale is None:
        col = k + tl.arange(0, BLOCK_K)[None, :]  # [1, BLOCK_K]
        pointer = weight.data + row * DIM + col  # [BLOCK_N, BLOCK_K]
        if DIM % BLOCK_K == 0:
            data = tl.load(pointer, eviction_policy="evict_first")  # [BLOCK_N, BLOCK_K]
        else:
            data = tl.load(pointer, mask=col < DIM, other=0.0, eviction_policy="evict_first")
        return Weight(data, None, None)
    else:
        UNIT: tl.constexpr = unit_of(weight)
        unit = k // UNIT + tl.arange(0, BLOCK_K // UNIT)[None, :]  # [1, UNITS]
        mask = unit < DIM // UNIT  # [1, UNITS]
        word = row * (DIM // UNIT * 4) + unit * 4  # [BLOCK_N, UNITS]
        word = word[:, :, None] + tl.arange(0, 4)[None, None, :]  # [BLOCK_N, UNITS, 4]
        words = tl.load(
            weight.data.to(tl.pointer_type(tl.int32)) + word, mask=mask[:, :, None], other=0,
            eviction_policy="evict_first",
        )  # fmt: skip
        if GROUP == DIM:
            group, mask = row, row >= 0  # [BLOCK_N, 1]
        elif BLOCK_K % GROUP == 0:
            group = k // GROUP + tl.arange(0, BLOCK_K // GROUP)[None, :]  # [1, BLOCK_K / GROUP]
            group, mask = row * (DIM // GROUP) + group, group < DIM // GROUP
        else:
            group = row * (DIM // GROUP) + unit // (GROUP // UNIT)  # [BLOCK_N, UNITS]
        scale = tl.load(weight.scale + group, mask=mask, other=0.0)
        minimum = None
        if weight.minimum is not None:
            minimum = tl.load(weight.minimum + group, mask=mask, other=0.0)
        return Weight(words, scale, minimum)


@triton.jit
def by_unit(factors, UNITS: tl.constexpr):
    """Repeats factors of groups :: [BLOCK_N, groups] for their units: fp32, [BLOCK_N, UNITS]."""
    BLOCK_N: tl.constexpr = factors.shape[0]
    GROUPS: tl.constexpr = factors.shape[1]
    factors = factors.to(tl.float32)[:, :, None]  # [BLOCK_N, groups, 1]
    factors = factors.broadcast_to([BLOCK_N, GROUPS, UNITS // GROUPS])
    return factors.reshape([BLOCK_N, UNITS])
