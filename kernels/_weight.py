"""Loads parts of a weight: blocks for matmuls of up to 8 rows, and rows of a table.

A unit is what a thread loads of a packed weight at a time: 16 bytes, which have 16 columns in 8
bits and 32 in 4 bits. The columns of a unit are in one group, so they share a scale.
"""

from typing import Any, NamedTuple

from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels.packed import Weight


class Seam(NamedTuple):
    """A column of a block at which the block's rows continue in other rows of the weight, and what
    is added to the rows' numbers before that column and from it on. Columns are counted on, as if
    the next row of the weight followed."""

    column: Any  # a multiple of the weight's group
    before: Any
    after: Any


@triton.constexpr_function
def unit_of(dtype):
    """Returns the columns in 16 bytes of a weight's data of this dtype."""
    return 32 if dtype == tl.uint8 else 128 // dtype.primitive_bitwidth


@triton.jit
def row_at(row, seam, col):
    """Returns the row of the weight, for row :: [BLOCK_N, 1] and col :: [1, cols]."""
    if seam is None:
        return row
    else:
        return row + tl.where(col < seam.column, seam.before, seam.after)  # [BLOCK_N, cols]


@triton.jit
def load_weight(
    weight,  # Weight [out, DIM]
    row,  # [BLOCK_N]
    k,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,  # columns that share a scale; 0: not packed
    BLOCK_K: tl.constexpr,
    seam=None,  # Seam | None: the block ends with the row
    END: tl.constexpr = None,  # end of the columns, with a seam
):
    """Loads columns k … k + BLOCK_K - 1 of rows of the weight: [BLOCK_N, BLOCK_K]. Of a packed
    weight, returns a Weight of values: data, int32 words of units :: [BLOCK_N, UNITS, 4], scale and
    minimum :: [BLOCK_N, groups], see by_unit."""
    LAST: tl.constexpr = DIM if END is None else END
    row = row.to(tl.int64)[:, None]  # [BLOCK_N, 1]
    if weight.scale is None:
        col = k + tl.arange(0, BLOCK_K)[None, :]  # [1, BLOCK_K]
        pointer = weight.data + row_at(row, seam, col) * DIM + col  # [BLOCK_N, BLOCK_K]
        if LAST % BLOCK_K == 0:
            return tl.load(pointer, eviction_policy="evict_first")  # [BLOCK_N, BLOCK_K]
        else:
            return tl.load(pointer, mask=col < LAST, other=0.0, eviction_policy="evict_first")
    else:
        UNIT: tl.constexpr = unit_of(weight.data.dtype.element_ty)
        unit = k // UNIT + tl.arange(0, BLOCK_K // UNIT)[None, :]  # [1, UNITS]
        mask = unit < LAST // UNIT  # [1, UNITS]
        # [BLOCK_N, UNITS]
        word = row_at(row, seam, unit * UNIT) * (DIM // UNIT * 4) + unit * 4
        word = word[:, :, None] + tl.arange(0, 4)[None, None, :]  # [BLOCK_N, UNITS, 4]
        words = tl.load(
            weight.data.to(tl.pointer_type(tl.int32)) + word, mask=mask[:, :, None], other=0,
            eviction_policy="evict_first",
        )  # fmt: skip
        if GROUP == DIM and seam is None:
            group, mask = row, row >= 0  # [BLOCK_N, 1]
        elif BLOCK_K % GROUP == 0:
            group = k // GROUP + tl.arange(0, BLOCK_K // GROUP)[None, :]  # [1, BLOCK_K / GROUP]
            group, mask = (
                row_at(row, seam, group * GROUP) * (DIM // GROUP) + group, group < LAST // GROUP
            )  # fmt: skip
        else:
            # [BLOCK_N, UNITS]
            group = row_at(row, seam, unit * UNIT) * (DIM // GROUP) + unit // (GROUP // UNIT)
        scale = tl.load(weight.scale + group, mask=mask, other=0.0)
        minimum = scale  # not used; Triton 3.6 cannot return None in a tuple
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


@triton.jit
def load_units(
    weight,  # Weight [rows, DIM], packed
    row,  # [BLOCK_R, UNITS] or broadcastable to it, int64
    col,  # [BLOCK_R, UNITS]: first column of each unit, a multiple of UNIT
    mask,  # [BLOCK_R, UNITS]
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,  # neighboring columns that a thread loads: a power of two up to 16
):
    """Returns elements of the weight, [BLOCK_R, UNITS * UNIT], fp32, or 0 where masked."""
    BLOCK_R: tl.constexpr = mask.shape[0]
    UNITS: tl.constexpr = mask.shape[1]
    INT8: tl.constexpr = weight.data.dtype.element_ty == tl.int8
    group = row * (DIM // GROUP) + col // GROUP  # [BLOCK_R, UNITS]
    byte = row * DIM + col if INT8 else row * (DIM // 2) + col // 32 * 16
    if not INT8 and UNIT < 16:
        byte += col % 16
    byte = byte[:, :, None] + tl.arange(0, UNIT)[None, None, :]  # [BLOCK_R, UNITS, UNIT]
    value = tl.load(weight.data + byte, mask=mask[:, :, None], other=0)
    if not INT8:
        value = value >> (col // 16 % 2 * 4).to(tl.uint8)[:, :, None] & 15
        if weight.minimum is None:
            value = value.to(tl.int8) - 8
    scale = tl.load(weight.scale + group, mask=mask, other=0.0)  # [BLOCK_R, UNITS]
    out = value.to(tl.float32) * scale.to(tl.float32)[:, :, None]  # [BLOCK_R, UNITS, UNIT]
    if weight.minimum is not None:
        minimum = tl.load(weight.minimum + group, mask=mask, other=0.0)  # [BLOCK_R, UNITS]
        out += minimum.to(tl.float32)[:, :, None]
    return out.reshape([BLOCK_R, UNITS * UNIT])  # [BLOCK_R, UNITS * UNIT]
