"""Multiplies a weight by an input of 2 to 8 rows, on tensor cores. The weight is read once, through
shared memory.

A packed weight is unpacked to x's dtype in registers, where the tensor cores need it. There, warps
with the same rows of the weight would unpack the same values, so each warp multiplies a part of
the columns, and the parts are added up at the end.
"""

from gemma_fast.kernels._matmul_input import load_input
from gemma_fast.kernels._prefetch import prefetch
from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels._weight import by_unit, load_weight, unit_of
from gemma_fast.kernels.packed import Weight

MAX_ROWS = 8
PARTS = tl.constexpr(4)  # of the columns of a packed block: one for each warp


@triton.jit
def prefetch_weight(
    weight,  # Weight [out, DIM]
    weight_row,  # [BLOCK_N]
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Fetches the first block of the weight into the L2 cache. (Tensor cores read weights from
    shared memory, and Triton copies to shared memory only inside the loop.)"""
    BITS: tl.constexpr = weight.data.dtype.element_ty.primitive_bitwidth
    LINE: tl.constexpr = 1024 // BITS  # elements in 128 bytes, a line of the L2 cache
    # columns in an element
    PACKED: tl.constexpr = unit_of(weight.data.dtype.element_ty) * BITS // 128
    END: tl.constexpr = DIM // PACKED  # elements in a row
    row = weight_row.to(tl.int64)[:, None]  # [BLOCK_N, 1]
    # [1, BLOCK_K / PACKED / LINE]
    col = tl.minimum(tl.arange(0, BLOCK_K // PACKED // LINE) * LINE, END - 1)[None, :]
    prefetch(weight.data + row * END + col)  # [BLOCK_N, BLOCK_K / PACKED / LINE]
    if weight.scale is not None:
        prefetch(weight.scale + row * (DIM // GROUP))
    if weight.minimum is not None:
        prefetch(weight.minimum + row * (DIM // GROUP))


@triton.jit
def _values(words, SHIFT: tl.constexpr, weight):
    """Returns the values at bit SHIFT of the words in fp32, computed as in _gemv.py. Here SHIFT is
    a constant, and not a tensor: then the compiler computes values where the tensor cores need
    them, without a copy to shared memory."""
    BITS: tl.constexpr = 128 // unit_of(weight.data.dtype.element_ty)
    SIGN: tl.constexpr = 128 if BITS == 8 else 0
    ZERO: tl.constexpr = 8 if BITS == 4 and weight.minimum is None else SIGN
    words = (words & (((1 << BITS) - 1) << SHIFT)) ^ (0x4B000000 | (SIGN << SHIFT))
    power: tl.constexpr = 1.0 / (1 << SHIFT)
    return words.to(tl.float32, bitcast=True) * power - (8388608.0 * power + ZERO)


@triton.jit
def _unpack(block, weight, dtype: tl.constexpr):
    """Returns the values of a packed block :: [BLOCK_N, BLOCK_K] in dtype, rounded once."""
    UNIT: tl.constexpr = unit_of(weight.data.dtype.element_ty)
    BLOCK_N: tl.constexpr = block.data.shape[0]
    UNITS: tl.constexpr = block.data.shape[1]
    words = tl.join(block.data, block.data >> 16)  # [BLOCK_N, UNITS, 4, 2]
    # [BLOCK_N, UNITS, 4, 2, 2]
    values = tl.join(_values(words, 0, weight), _values(words, 8, weight))
    if UNIT == 32:
        high = tl.join(_values(words, 4, weight), _values(words, 12, weight))
        values = tl.join(values, high).permute(0, 1, 5, 2, 3, 4)  # [BLOCK_N, UNITS, 2, 4, 2, 2]
    values = values.reshape([BLOCK_N, UNITS, UNIT])
    values *= by_unit(block.scale, UNITS)[:, :, None]
    if weight.minimum is not None:
        values += by_unit(block.minimum, UNITS)[:, :, None]
    return values.reshape([BLOCK_N, UNITS * UNIT]).to(dtype)  # [BLOCK_N, BLOCK_K]


@triton.jit
def skinny_matmul(
    weight,  # Weight [out, DIM]
    weight_row,  # [BLOCK_N]
    inputs,  # MatmulInput
    scales,  # Scales
    h_ptr,  # [rows, DIM] | None
    rows,
    OFFSET: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr,  # rows, rounded up to MAX_ROWS
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Returns rows weight_row of the weight times the input, [BLOCK_N, BLOCK_B], fp32."""
    BLOCK_N: tl.constexpr = weight_row.shape[0]
    if weight.scale is None:
        out = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    else:
        out = tl.zeros([PARTS, BLOCK_N, BLOCK_B], tl.float32)
    for k in tl.range(0, DIM, BLOCK_K, num_stages=STAGES):
        # [BLOCK_B, BLOCK_K]
        x = load_input(inputs, scales, h_ptr, rows, k, OFFSET, DIM, BLOCK_B, BLOCK_K)
        block = load_weight(weight, weight_row, k, DIM, GROUP, BLOCK_K)
        if weight.scale is None:
            # [BLOCK_N, BLOCK_B]
            out = tl.dot(block, x.T, out, input_precision="ieee")
        else:
            values = _unpack(block, weight, x.dtype)  # [BLOCK_N, BLOCK_K]
            # [PARTS, BLOCK_N, BLOCK_K / PARTS]
            values = values.reshape([BLOCK_N, PARTS, BLOCK_K // PARTS]).permute(1, 0, 2)
            # [PARTS, BLOCK_K / PARTS, BLOCK_B]
            x = x.reshape([BLOCK_B, PARTS, BLOCK_K // PARTS]).permute(1, 2, 0)
            out = tl.dot(values, x, out, input_precision="ieee")  # [PARTS, BLOCK_N, BLOCK_B]
    return out if weight.scale is None else tl.sum(out, axis=0)


def default_config(weight: Weight, itemsize: int) -> dict[str, int]:
    """Returns the launch config for an x whose elements have `itemsize` bytes."""
    few = weight.shape[0] <= 4096  # few programs: each keeps more blocks in flight
    if weight.scale is None:
        block, stages = 512 // itemsize, 6 if few else 3
    else:  # columns of x take more shared memory than those of the weight
        block, stages = 1024 // itemsize, 4 if few else 3
    return {
        "BLOCK_B": MAX_ROWS, "BLOCK_N": 16 if few or itemsize == 4 else 32, "BLOCK_K": block,
        "STAGES": stages, "num_warps": 4,
    }  # fmt: skip
