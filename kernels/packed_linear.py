"""Matmul with a packed weight where _gemv.py and _skinny.py do not compute it: for more than
MAX_ROWS rows, and without Triton.

    y = x @ weightᵀ

x      :: [..., dim], bf16 | fp16 | fp32
weight :: packed, see packed.py
y      :: [..., out], x.dtype

The weight is read in 8 or 4 bits. A block of it is unpacked in registers: computed in fp32 and
rounded to x.dtype once, as `Weight.unpack` does. Sums are in fp32.
Bound by compute for prompts: FLOPs = 2 * y.numel() * dim; by memory for few rows: bytes =
weight.nbytes. Walk-through steps: project to Q, K, V; MLP; lm_head.

The weight is the left operand, because Hopper's tensor cores can read that one from registers. Its
columns may be in any order, if those of x are in the same order. So 4 bits are two matmuls: the low
halves of the bytes times x's columns 0 … 15, 32 … 47, …, and the high halves times the others.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_fast.kernels._tiles import tile_at
from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels.cpu import matmul
from gemma_fast.kernels.cpu.calls import reads, runs_c
from gemma_fast.kernels.launch import Gpu, gpu, launch_config, runs_triton
from gemma_fast.kernels.packed import Weight

ELEMENTS = 1 << 20  # of the weight that the reference unpacks at once, few enough for the cache


def torch_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Returns x @ weightᵀ for a weight that is not packed, computed by a library."""
    # As one matrix: for a strided batch F.linear runs a batched matmul and copies the weight.
    rows = x.reshape(-1, x.shape[-1])  # [rows, dim]
    y = matmul.linear(rows, weight) if x.is_cpu else F.linear(rows, weight)
    return y.view(*x.shape[:-1], weight.shape[0])


def packed_linear_reference(x: Tensor, weight: Weight) -> Tensor:
    """Unpacks some rows of the weight at a time."""
    out, dim = weight.shape
    rows = x.reshape(-1, dim)
    y = torch.empty(len(rows), out, dtype=x.dtype, device=x.device)
    step = max(ELEMENTS // dim, 1)
    for start in range(0, out, step):
        stop = min(start + step, out)
        y[:, start:stop] = torch_linear(rows, weight.rows(start, stop).unpack(x.dtype))
    return y.view(*x.shape[:-1], out)


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


@triton.jit(do_not_specialize=["rows"])
def _packed_linear_kernel(
    x_ptr,  # [rows, DIM], contiguous
    weight,  # Weight [OUT, DIM]
    out_ptr,  # [rows, OUT], contiguous
    rows,
    OUT: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,  # columns that share a scale
    BLOCK_M: tl.constexpr,  # rows of x
    BLOCK_N: tl.constexpr,  # rows of the weight
    BLOCK_K: tl.constexpr,  # divides DIM; a multiple or a divisor of GROUP
    GROUP_M: tl.constexpr,  # tiles of rows that share weights in the L2 cache
):
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(OUT, BLOCK_N)
    tile_m, tile_n = tile_at(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    x_ptr += (m % rows).to(tl.int64)[:, None] * DIM  # [BLOCK_M, 1]
    row = (n % OUT).to(tl.int64)  # [BLOCK_N]

    dtype: tl.constexpr = out_ptr.dtype.element_ty
    out = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in range(0, DIM, BLOCK_K):
        k = tl.multiple_of(k, BLOCK_K)
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
    pointer = out_ptr + m.to(tl.int64)[None, :] * OUT + n[:, None]  # [BLOCK_N, BLOCK_M]
    tl.store(pointer, out, mask=(n < OUT)[:, None] & (m < rows)[None, :])


def default_config(rows: int, weight: Weight, itemsize: int, gpu: Gpu) -> dict[str, int]:
    """Returns the launch config: operands fit in shared memory, and no register is spilled. If
    there are few tiles, they are narrow, so that more multiprocessors have work, and long, so that
    as many bytes are in flight."""
    out, large = weight.shape[0], gpu.shared_memory > 200_000 and itemsize == 2
    block_m = min(max(triton.next_power_of_2(rows), 16), 32 if itemsize == 4 else 128)
    block_n, block_k = 64 if itemsize == 4 else 128, 64 if large else 32
    tiles = triton.cdiv(rows, block_m) * triton.cdiv(out, block_n)
    if gpu.capability == 90 and itemsize == 2 and tiles >= 2 * gpu.multiprocessors:
        # The weight is unpacked half as often. (On 10.0, it would not fit in tensor memory.)
        block_m = min(2 * block_m, 256)
    while block_n > 16 and 2 * tiles <= gpu.multiprocessors:
        block_n, block_k, tiles = block_n // 2, min(2 * block_k, 256), 2 * tiles
    stages = 4 if block_n >= 64 else 6
    while stages * block_k * (block_m * itemsize + block_n) > gpu.shared_memory:
        block_k //= 2
    return {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": 8,
        "num_warps": 8 if block_n == 128 else 4, "num_stages": stages,
    }  # fmt: skip


def fitting_block(weight: Weight, block_k: int) -> int:
    """Returns the largest BLOCK_K up to block_k that divides the weight's columns, and holds whole
    groups or a part of one group."""
    while weight.shape[1] % block_k or (weight.group % block_k and block_k % weight.group):
        block_k //= 2
    return block_k


def packed_linear(x: Tensor, weight: Weight) -> Tensor:
    """Returns x @ weightᵀ. Runs the reference where Triton does not run."""
    if runs_c(x) and reads(weight):
        return matmul.packed_linear(x, weight)
    if not runs_triton(x):
        return packed_linear_reference(x, weight)

    assert x.is_cuda or x.dtype != torch.bfloat16, "the interpreter multiplies bf16 as integers"
    assert all(part is None or part.is_contiguous() for part in weight)
    out_dim, dim = weight.shape
    flat = x.reshape(-1, dim).contiguous()  # [rows, dim]
    if flat.data_ptr() % 16:  # 16-byte loads need an aligned address
        flat = flat.clone()
    rows = len(flat)
    out = torch.empty((rows, out_dim), dtype=x.dtype, device=x.device)
    config = default_config(rows, weight, x.element_size(), gpu(x.device))
    config = launch_config("packed_linear", config)
    config["BLOCK_K"] = fitting_block(weight, config["BLOCK_K"])
    if rows:
        programs = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(out_dim, config["BLOCK_N"])
        _packed_linear_kernel[(programs,)](
            flat, weight, out, rows, OUT=out_dim, DIM=dim, GROUP=weight.group, **config
        )
    return out.view(*x.shape[:-1], out_dim)
