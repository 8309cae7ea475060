"""Loads blocks of a weight, and unpacks those of a packed weight in registers.

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
            group = row  # [BLOCK_N, 1]
            mask = row >= 0
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


@triton.jit
def _integers(words, SHIFT: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr):
    """Returns the integers at bit SHIFT of the words, minus ZERO, in fp32.

    A masked word with the exponent of 2^23 is the float 2^23 + q * 2^SHIFT. This takes two
    instructions; conversions from integers have less throughput.
    """
    SIGN: tl.constexpr = 128 if BITS == 8 else 0  # flipped: q = value + 128
    words = (words & (((1 << BITS) - 1) << SHIFT)) ^ (0x4B000000 | (SIGN << SHIFT))
    power: tl.constexpr = 1.0 / (1 << SHIFT)
    return words.to(tl.float32, bitcast=True) * power - (8388608.0 * power + ZERO)


@triton.jit
def packed_values(words, weight):
    """Returns the integers of words of units :: [BLOCK_N, UNITS, 4] in fp32: [BLOCK_N, UNITS, UNIT].
    """
    UNIT: tl.constexpr = unit_of(weight)
    BITS: tl.constexpr = 128 // UNIT
    ZERO: tl.constexpr = 128 if BITS == 8 else (8 if weight.minimum is None else 0)
    shape: tl.constexpr = [words.shape[0], words.shape[1], UNIT]
    words = tl.join(words, words >> 16)  # [BLOCK_N, UNITS, 4, 2]
    # [BLOCK_N, UNITS, 4, 2, 2]
    values = tl.join(_integers(words, 0, BITS, ZERO), _integers(words, 8, BITS, ZERO))
    if BITS == 4:
        high = tl.join(_integers(words, 4, BITS, ZERO), _integers(words, 12, BITS, ZERO))
        values = tl.join(values, high).permute(0, 1, 5, 2, 3, 4)  # [BLOCK_N, UNITS, 2, 4, 2, 2]
    return values.reshape(shape)


@triton.jit
def unpack(block, weight, dtype: tl.constexpr):
    """Returns the block's values :: [BLOCK_N, BLOCK_K] in dtype, rounded once."""
    if weight.scale is None:
        return block.data
    else:
        values = packed_values(block.data, weight)  # [BLOCK_N, UNITS, UNIT]
        values *= by_unit(block.scale, values.shape[1])[:, :, None]
        if weight.minimum is not None:
            values += by_unit(block.minimum, values.shape[1])[:, :, None]
        shape: tl.constexpr = [values.shape[0], values.shape[1] * values.shape[2]]
        return values.reshape(shape).to(dtype)  # [BLOCK_N, BLOCK_K]
