"""Unpacks parts of a packed weight in registers: weight = scale * value + minimum (packed.py)."""

from gemma_fast.kernels._triton import tl, triton


@triton.jit
def load_factors(
    factors,  # scale or minimum of a Weight [out, DIM / GROUP] | None
    row,  # [BLOCK_N], int64
    k,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Loads the factors of columns k … k + BLOCK_K - 1: [BLOCK_N, groups], or None."""
    GROUPS: tl.constexpr = (BLOCK_K + GROUP - 1) // GROUP
    if factors is None:
        loaded = None
    else:
        group = k // GROUP + tl.arange(0, GROUPS)[None, :]  # [1, groups]
        loaded = tl.load(factors + row[:, None] * (DIM // GROUP) + group)  # [BLOCK_N, groups]
    return loaded


@triton.jit
def unpack(
    value,  # [BLOCK_N, columns], integers
    scale,  # [BLOCK_N, groups]; the columns of a group are neighbors
    minimum,  # [BLOCK_N, groups] | None
    dtype: tl.constexpr,
):
    """Returns the weight in dtype, [BLOCK_N, columns], computed in fp32 and rounded once."""
    BLOCK_N: tl.constexpr = value.shape[0]
    COLUMNS: tl.constexpr = value.shape[1]
    GROUPS: tl.constexpr = scale.shape[1]
    # [BLOCK_N, groups, columns of a group]
    weight = value.to(tl.float32).reshape([BLOCK_N, GROUPS, COLUMNS // GROUPS])
    weight *= scale.to(tl.float32)[:, :, None]
    if minimum is not None:
        weight += minimum.to(tl.float32)[:, :, None]
    return weight.reshape([BLOCK_N, COLUMNS]).to(dtype)  # [BLOCK_N, columns]


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
