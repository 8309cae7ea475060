"""Multiplies a block of a weight's rows by up to MAX_ROWS rows: what one program of a decode step's
matmul computes. One row: see _gemv.py. More rows: see _skinny.py."""

from gemma_fast.kernels._gemv import gemv
from gemma_fast.kernels._matmul_input import Scales, norm_scales
from gemma_fast.kernels._op import wait_for_previous_kernel
from gemma_fast.kernels._skinny import prefetch_weight, skinny_matmul
from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels._weight import load_weight
from gemma_fast.kernels.geglu import geglu_in_fp32
from gemma_fast.kernels.packed import Weight


@triton.jit
def matvec_block(
    program,  # number of the block
    inputs,  # MatmulInput
    weight,  # Weight [OUT, DIM]; with GEGLU [2 * OUT, DIM], gate then up
    first_row,  # first row of this weight in a stack of weights | None: 0
    out_ptr,  # [rows, OUT]
    h_ptr,  # [rows, DIM] | None
    up_ptr,  # [rows, OUT] | None
    up_row_stride,  # None without up
    rows,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    DIM: tl.constexpr,
    OUT: tl.constexpr,
    GROUP: tl.constexpr,  # columns that share a scale; 0: the weight is not packed
    GEGLU: tl.constexpr,
    BLOCK_B: tl.constexpr,  # rows, rounded up to 1 or MAX_ROWS
    BLOCK_N: tl.constexpr,  # rows of the weight; with GEGLU half of them gate, half up
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,  # blocks in flight at once
    PDL: tl.constexpr,
):
    """Stores the block's columns of the output. Fetches weights before the wait for the previous
    kernel. If h_ptr is given, block 0 stores h."""
    COLS: tl.constexpr = BLOCK_N // 2 if GEGLU else BLOCK_N  # columns of the output
    n = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    weight_row = (program * COLS + n % COLS) % OUT + n // COLS * OUT  # [BLOCK_N]
    if first_row is not None:
        weight_row += first_row
    if BLOCK_B == 1:
        first_block = load_weight(weight, weight_row, 0, DIM, GROUP, BLOCK_K)
    elif PDL:
        prefetch_weight(weight, weight_row, DIM, GROUP, BLOCK_K)
    wait_for_previous_kernel(PDL)
    if up_ptr is not None:  # before the matmul, which hides the latency
        col = program * COLS + tl.arange(0, COLS)[:, None]  # [COLS, 1]
        row = tl.arange(0, BLOCK_B)[None, :]  # [1, BLOCK_B]
        up = up_ptr + row * up_row_stride + col  # [COLS, BLOCK_B]
        up = tl.load(up, mask=(col < OUT) & (row < rows), other=0.0)
    scales = Scales(0.0, 0.0, 0.0)
    if inputs.norm_weight is not None or inputs.post_norm_weight is not None:
        scales = norm_scales(inputs, h_ptr, rows, program == 0, EPS, OFFSET, DIM, BLOCK_B, BLOCK_K)
    if BLOCK_B == 1:
        # [BLOCK_N, 1]
        out = gemv(
            first_block, None, weight, weight_row, inputs, scales, h_ptr, rows,
            OFFSET, DIM, GROUP, BLOCK_K, STAGES,
        )  # fmt: skip
    else:
        # [BLOCK_N, BLOCK_B]
        out = skinny_matmul(
            weight, weight_row, inputs, scales, h_ptr, rows,
            OFFSET, DIM, GROUP, BLOCK_B, BLOCK_K, STAGES,
        )  # fmt: skip
    if GEGLU:
        gate, up = out.reshape([2, COLS, BLOCK_B]).permute(1, 2, 0).split()  # [COLS, BLOCK_B]
        out = geglu_in_fp32(gate, up)  # [COLS, BLOCK_B]
    elif up_ptr is not None:
        out = geglu_in_fp32(out, up.to(tl.float32))
    col = program * COLS + tl.arange(0, COLS)[:, None]  # [COLS, 1]
    row = tl.arange(0, BLOCK_B)[None, :]  # [1, BLOCK_B]
    tl.store(out_ptr + row * OUT + col, out, mask=(col < OUT) & (row < rows))


def row_block(weight: Weight) -> dict[str, int]:
    """Returns rows and columns of the blocks in which a weight is multiplied by one row, and how
    many are in flight: at most a quarter of a row's columns are masked in the last block, if blocks
    of 512 bytes allow that. A thread of 128 loads at least 64 bytes."""
    dim, line = weight.shape[1], weight.data[:1].nbytes  # bytes of a row
    block = next((x for x in (2048, 1024) if -line % x <= line / 4), 512)
    return {
        "BLOCK_N": 16 if block == 512 else 8, "BLOCK_K": block * dim // line,
        "STAGES": min(triton.cdiv(line, block), 4),
    }  # fmt: skip
