"""Multiplies a weight, packed or not, by many rows of x, on tensor cores.

A packed weight is read in 8 or 4 bits. A block of it is unpacked in registers: computed in fp32 and
rounded to x.dtype once, as `Weight.unpack` does. Sums are in fp32.

The weight is the left operand, because Hopper's tensor cores can read that one from registers. Its
columns may be in any order, if those of x are in the same order. So 4 bits are two matmuls: the low
halves of the bytes times x's columns 0 … 15, 32 … 47, …, and the high halves times the others.
"""

from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels.packed import Weight


@triton.jit
def _load_factors(
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
def _unpack(
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
def _add_packed_block(
    out,  # [BLOCK_N, BLOCK_M], fp32
    weight,  # Weight [out, DIM], packed
    row,  # [BLOCK_N], int64
    x_ptr,  # [BLOCK_M, 1], pointers
    k,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    dtype: tl.constexpr,  # of x
):
    """Adds the matmul of columns k … k + BLOCK_K - 1 to out."""
    scale = _load_factors(weight.scale, row, k, DIM, GROUP, BLOCK_K)  # [BLOCK_N, groups]
    minimum = _load_factors(weight.minimum, row, k, DIM, GROUP, BLOCK_K)
    if weight.data.dtype.element_ty == tl.int8:
        col = k + tl.arange(0, BLOCK_K)[None, :]  # [1, BLOCK_K]
        value = tl.load(weight.data + row[:, None] * DIM + col)  # [BLOCK_N, BLOCK_K]
        x = tl.load(x_ptr + col)  # [BLOCK_M, BLOCK_K]
        block = _unpack(value, scale, minimum, dtype)  # [BLOCK_N, BLOCK_K]
        out = tl.dot(block, x.T, out, input_precision="ieee")  # [BLOCK_N, BLOCK_M]
    else:
        byte = tl.arange(0, BLOCK_K // 2)[None, :]  # [1, BLOCK_K / 2]
        value = tl.load(weight.data + row[:, None] * (DIM // 2) + (k // 2 + byte))
        col = k + byte // 16 * 32 + byte % 16  # [1, BLOCK_K / 2]
        low_x = tl.load(x_ptr + col)  # [BLOCK_M, BLOCK_K / 2]
        high_x = tl.load(x_ptr + (col + 16))
        low, high = (value & 15).to(tl.int8), (value >> 4).to(tl.int8)  # [BLOCK_N, BLOCK_K / 2]
        if weight.minimum is None:
            low, high = low - 8, high - 8
        low_block = _unpack(low, scale, minimum, dtype)
        out = tl.dot(low_block, low_x.T, out, input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        high_block = _unpack(high, scale, minimum, dtype)
        out = tl.dot(high_block, high_x.T, out, input_precision="ieee")
    return out


@triton.jit
def prompt_matmul(
    weight,  # Weight [out, DIM]
    row,  # [BLOCK_N], int64: rows of the weight
    x_ptr,  # [BLOCK_M, 1], pointers to contiguous rows of x
    DIM: tl.constexpr,
    GROUP: tl.constexpr,  # columns that share a scale; 0: not packed
    BLOCK_K: tl.constexpr,  # if packed: divides DIM; a multiple or a divisor of GROUP
    dtype: tl.constexpr,  # of x
):
    """Returns rows of the weight times rows of x, [BLOCK_N, BLOCK_M], fp32."""
    out = tl.zeros([row.shape[0], x_ptr.shape[0]], tl.float32)
    for k in range(0, DIM, BLOCK_K):
        k = tl.multiple_of(k, BLOCK_K)
        if weight.scale is not None:
            out = _add_packed_block(out, weight, row, x_ptr, k, DIM, GROUP, BLOCK_K, dtype)
        else:
            col = k + tl.arange(0, BLOCK_K)[None, :]  # [1, BLOCK_K]
            mask = col < DIM  # the compiler removes a mask that is always true
            block = tl.load(weight.data + row[:, None] * DIM + col, mask=mask, other=0.0)
            x = tl.load(x_ptr + col, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_K]
            out = tl.dot(block, x.T, out, input_precision="ieee")  # [BLOCK_N, BLOCK_M]
    return out


def fitting_block(weight: Weight, block_k: int) -> int:
    """Returns the largest BLOCK_K up to block_k that divides the weight's columns, and holds whole
    groups or a part of one group."""
    while weight.shape[1] % block_k or (weight.group % block_k and block_k % weight.group):
        block_k //= 2
    return block_k
