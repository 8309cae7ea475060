"""Multiplies a weight by an input of one row: elementwise, with sums in registers. The weight is
read once.

A thread loads 16 bytes of the weight at a time. Its partial sums stay in its own columns until the
end, so the loop has no reduction across threads. The integers of a packed weight are multiplied
exactly; the sum of 16 bytes is multiplied by the scale of its group, in fp32.
"""

from gemma_fast.kernels._matmul_input import load_input
from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels._weight import by_unit, load_weight, unit_of
from gemma_fast.kernels.packed import Weight


@triton.jit
def _packed_values(words, weight):
    """Returns the values of units' words :: [BLOCK_N, UNITS, 4] in fp32: [BLOCK_N, UNITS, UNIT].

    A masked word with the exponent of 2^23 is the float 2^23 + q * 2^shift. So a value takes two
    instructions; conversions from integers have less throughput. (Shifts are tensors. With constant
    shifts, as in _skinny.py, a thread takes twice the registers.)
    """
    UNIT: tl.constexpr = unit_of(weight.data.dtype.element_ty)
    BITS: tl.constexpr = 128 // UNIT
    SIGN: tl.constexpr = 128 if BITS == 8 else 0  # flipped: the value is q + 128
    ZERO: tl.constexpr = 8 if BITS == 4 and weight.minimum is None else SIGN
    half = tl.arange(0, 8 // BITS)[None, None, :, None, None, None]  # [1, 1, 8 / BITS, 1, 1, 1]
    pair = tl.arange(0, 2)[None, None, None, None, :, None]  # [1, 1, 1, 1, 2, 1]
    byte = tl.arange(0, 2)[None, None, None, None, None, :]  # [1, 1, 1, 1, 1, 2]
    shift = byte * 8 + half * 4  # [1, 1, 8 / BITS, 1, 1, 2]
    shape: tl.constexpr = [words.shape[0], words.shape[1], UNIT]
    words = words[:, :, None, :, None, None] >> (pair * 16)  # [BLOCK_N, UNITS, 1, 4, 2, 1]
    words &= ((1 << BITS) - 1) << shift  # [BLOCK_N, UNITS, 8 / BITS, 4, 2, 2]
    floats = (words ^ (0x4B000000 | (SIGN << shift))).to(tl.float32, bitcast=True)
    power = (0x3F800000 - (shift << 23)).to(tl.float32, bitcast=True)  # 2^-shift
    values = floats * power - (8388608.0 * power + ZERO)
    return values.reshape(shape)  # [BLOCK_N, UNITS, UNIT]


@triton.jit
def add_products(sums, block, weight, x):
    """Adds block [BLOCK_N, BLOCK_K] of the weight * x [1, BLOCK_K] to sums [BLOCK_N, COLS]. Each
    sum adds up neighboring columns that one thread holds."""
    if weight.scale is None:
        products = block.to(tl.float32) * x.to(tl.float32)  # [BLOCK_N, BLOCK_K]
        split: tl.constexpr = [sums.shape[0], sums.shape[1], x.shape[1] // sums.shape[1]]
        products = products.reshape(split)  # [BLOCK_N, COLS, BLOCK_K / COLS]
        return sums + tl.sum(products, axis=2)  # [BLOCK_N, COLS]
    else:
        values = _packed_values(block.data, weight)  # [BLOCK_N, COLS, BLOCK_K / COLS]
        # [1, COLS, BLOCK_K / COLS]
        x = x.to(tl.float32).reshape([1, values.shape[1], values.shape[2]])
        # [BLOCK_N, COLS]
        sums += tl.sum(values * x, axis=2) * by_unit(block.scale, values.shape[1])
        if weight.minimum is not None:
            sums += tl.sum(x, axis=2) * by_unit(block.minimum, values.shape[1])
        return sums


@triton.jit
def gemv(
    first_block,  # from load_weight, columns 0 … BLOCK_K - 1, loaded before
    first_x,  # [1, BLOCK_K], columns 0 … BLOCK_K - 1 of the input | None: loaded here
    weight,  # Weight [out, DIM]
    weight_row,  # [BLOCK_N]
    inputs,  # MatmulInput, one row
    scales,  # Scales
    h_ptr,  # [1, DIM] | None
    rows,  # 1
    OFFSET: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Returns rows weight_row of the weight times the input, [BLOCK_N, 1], fp32."""
    BLOCK_N: tl.constexpr = weight_row.shape[0]
    sums = tl.zeros([BLOCK_N, BLOCK_K // unit_of(weight.data.dtype.element_ty)], tl.float32)
    if first_x is None:
        # [1, BLOCK_K]
        first_x = load_input(inputs, scales, h_ptr, rows, 0, OFFSET, DIM, 1, BLOCK_K)
    for k in tl.range(BLOCK_K, DIM, BLOCK_K, num_stages=STAGES):
        # [1, BLOCK_K]
        x = load_input(inputs, scales, h_ptr, rows, k, OFFSET, DIM, 1, BLOCK_K)
        block = load_weight(weight, weight_row, k, DIM, GROUP, BLOCK_K)
        sums = add_products(sums, block, weight, x)
    # The block in registers comes last: the loop's loads are then issued before it is used.
    # [BLOCK_N, 1]
    return tl.sum(add_products(sums, first_block, weight, first_x), axis=1, keep_dims=True)


def default_config(weight: Weight, itemsize: int) -> dict[str, int]:
    """Returns the launch config for an x whose elements have `itemsize` bytes."""
    (out, dim), line = weight.shape, weight.data[:1].nbytes  # bytes of a row
    columns = 2 * dim // line if weight.scale is not None else 1  # in 16 bits
    if 2048 < line <= 4096 and columns < 4:
        block = 4096  # a block has whole rows: PDL loads all weights before its wait
    elif line <= 512:
        block = 512
    else:  # the size that leaves fewer columns of the last block unused
        block = min(2048, 1024, key=lambda block: (-line % block, -block))
    rows, stages = 4 if out <= 4096 else 8, 4
    if columns == 4 and (rows == 4 or line <= block):  # 16 rows in a loop would spill registers
        rows *= 2
    if columns > 1:  # a block has more columns of x, which take shared memory
        stages = 3 if itemsize == 2 else 2
    return {
        "BLOCK_B": 1, "BLOCK_N": rows, "BLOCK_K": block * dim // line, "STAGES": stages,
        "num_warps": min(block // 512, 4),
    }  # fmt: skip
