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
    minimum of each unit :: [BLOCK_N, UNITS]."""
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
        group = row * (DIM // GROUP) + unit // (GROUP // UNIT)  # [BLOCK_N, UNITS]
        scale = tl.load(weight.scale + group, mask=mask, other=0.0)  # [BLOCK_N, UNITS]
        minimum = None
        if weight.minimum is not None:
            minimum = tl.load(weight.minimum + group, mask=mask, other=0.0)  # [BLOCK_N, UNITS]
        return Weight(words, scale, minimum)


@triton.jit
def packed_values(words, weight):
    """Returns the integers of words of units :: [BLOCK_N, UNITS, 4] in fp32: [BLOCK_N, UNITS, UNIT].

    A masked word with the exponent of 2^23 is the float 2^23 + q * 2^shift. This takes two
    instructions a value; conversions from integers have less throughput.
    """
    UNIT: tl.constexpr = unit_of(weight)
    BITS: tl.constexpr = 128 // UNIT
    byte = tl.arange(0, 4)[None, None, None, None, :]  # [1, 1, 1, 1, 4]
    half = tl.arange(0, 8 // BITS)[None, None, :, None, None]  # [1, 1, 8 / BITS, 1, 1]
    shift = byte % 2 * 8 + half * 4  # [1, 1, 8 / BITS, 1, 4]
    ZERO: tl.constexpr = 128 if BITS == 8 else (8 if weight.minimum is None else 0)
    if BITS == 8:
        words ^= -0x7F7F7F80  # 0x80808080: value + 128
    words = words[:, :, None, :, None]  # [BLOCK_N, UNITS, 1, 4, 1]
    words = (words >> (byte // 2 * 16)) & (((1 << BITS) - 1) << shift)
    floats = (words | 0x4B000000).to(tl.float32, bitcast=True)  # [BLOCK_N, UNITS, 8 / BITS, 4, 4]
    power = (0x3F800000 - (shift << 23)).to(tl.float32, bitcast=True)  # 2^-shift
    values = floats * power - (8388608.0 * power + ZERO)
    return values.reshape([words.shape[0], words.shape[1], UNIT])


@triton.jit
def unpack(block, weight, dtype: tl.constexpr):
    """Returns the block's values :: [BLOCK_N, BLOCK_K] in dtype, rounded once."""
    if weight.scale is None:
        return block.data
    values = packed_values(block.data, weight)  # [BLOCK_N, UNITS, UNIT]
    values *= block.scale.to(tl.float32)[:, :, None]
    if weight.minimum is not None:
        values += block.minimum.to(tl.float32)[:, :, None]
    shape: tl.constexpr = [values.shape[0], values.shape[1] * values.shape[2]]
    return values.reshape(shape).to(dtype)  # [BLOCK_N, BLOCK_K]
