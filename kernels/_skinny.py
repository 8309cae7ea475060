"""Multiplies a weight by an input of 2 to 8 rows, on tensor cores. The weight is read once, through
shared memory."""

from gemma_fast.kernels._matmul_input import load_input
from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels._weight import load_weight, unit_of, unpack
from gemma_fast.kernels.packed import Weight

MAX_ROWS = 8


@triton.jit
def prefetch_weight(
    weight,  # Weight [out, DIM]
    weight_row,  # [BLOCK_N]
    DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Fetches the first block of the weight into the L2 cache. (Tensor cores read weights from
    shared memory, and Triton copies to shared memory only inside the loop.)"""
    BITS: tl.constexpr = weight.data.dtype.element_ty.primitive_bitwidth
    LINE: tl.constexpr = 1024 // BITS  # elements in 128 bytes, a line of the L2 cache
    PACKED: tl.constexpr = unit_of(weight) * BITS // 128  # columns in an element
    END: tl.constexpr = DIM // PACKED
    # [1, BLOCK_K / PACKED / LINE]
    col = tl.minimum(tl.arange(0, BLOCK_K // PACKED // LINE) * LINE, END - 1)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l",
        # [BLOCK_N, BLOCK_K / PACKED / LINE]
        [weight.data + weight_row.to(tl.int64)[:, None] * END + col],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


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
    PARTS: tl.constexpr = 1 if weight.scale is None else 4
    out = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    if PARTS > 1:
        out = tl.zeros([PARTS, BLOCK_N, BLOCK_B], tl.float32)
    for k in tl.range(0, DIM, BLOCK_K, num_stages=STAGES):
        # [BLOCK_B, BLOCK_K]
        x = load_input(inputs, scales, h_ptr, rows, k, OFFSET, DIM, BLOCK_B, BLOCK_K)
        block = load_weight(weight, weight_row, k, DIM, GROUP, BLOCK_K)
        block = unpack(block, weight, x.dtype)  # [BLOCK_N, BLOCK_K]
        if PARTS > 1:
            # [PARTS, BLOCK_N, BLOCK_K / PARTS]
            block = block.reshape([BLOCK_N, PARTS, BLOCK_K // PARTS]).permute(1, 0, 2)
            # [PARTS, BLOCK_K / PARTS, BLOCK_B]
            x = x.reshape([BLOCK_B, PARTS, BLOCK_K // PARTS]).permute(1, 2, 0)
            out = tl.dot(block, x, out, input_precision="ieee")
        else:
            out = tl.dot(block, x.T, out, input_precision="ieee")  # [BLOCK_N, BLOCK_B]
    if PARTS > 1:
        out = tl.sum(out, axis=0)
    return out


def default_config(weight: Weight, itemsize: int) -> dict[str, int]:
    """Returns the launch config for an x whose elements have `itemsize` bytes."""
    (out, dim), line = weight.shape, weight.data[:1].nbytes  # bytes of a row
    few = out <= 4096  # few programs: each keeps more blocks in flight
    return {
        "BLOCK_B": MAX_ROWS, "BLOCK_N": 16 if few or itemsize == 4 else 32,
        "BLOCK_K": (256 if weight.scale is not None else 512) * dim // line, "STAGES": 6 if few else 3, "num_warps": 4,
    }  # fmt: skip
