"""Matmul with a packed weight where _gemv.py and _skinny.py do not compute it: for more than
MAX_ROWS rows, and without Triton.

    y = x @ weightᵀ

x      :: [..., dim], bf16 | fp16 | fp32
weight :: packed, see packed.py
y      :: [..., out], x.dtype

_prompt_matmul.py computes it: the weight is read in 8 or 4 bits, and rounded to x.dtype once.
Bound by compute for prompts: FLOPs = 2 * y.numel() * dim; by memory for few rows: bytes =
weight.nbytes. Walk-through steps: project to Q, K, V; MLP; lm_head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_fast.kernels._prompt_matmul import fitting_block, prompt_matmul
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
    out = prompt_matmul(weight, row, x_ptr, DIM, GROUP, BLOCK_K, dtype)  # [BLOCK_N, BLOCK_M]
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
