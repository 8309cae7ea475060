"""GeGLU, the gated activation of the MLP: after both projections, or fused into their matmul.

    geglu          y = gelu(gate) * up
    gate_up_geglu  y = geglu(gate, up); gate, up = halves of x @ gate_up_projᵀ, never written out
    gelu(g) = g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 g³)))     # the tanh approximation

gate, up     :: [..., dim], bf16 | fp16 | fp32; may be halves of one tensor
x            :: [..., hidden], bf16 | fp16 | fp32
gate_up_proj :: [2 * dim, hidden], x.dtype; rows of the gate, then rows of up
y            :: [..., dim], the input's dtype

Computed in fp32 and rounded once. (Eager PyTorch also rounds gelu(gate) and the projections.)
geglu is bound by memory: bytes = 3 * y.numel() * itemsize. gate_up_geglu is bound by compute:
FLOPs = 4 * y.numel() * hidden; it saves 4 * y.numel() * itemsize bytes. Walk-through step: GeGLU.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_fast.kernels._op import op
from gemma_fast.kernels._tiles import tile_at
from gemma_fast.kernels._triton import TensorDescriptor, tl, triton
from gemma_fast.kernels.cpu import calls
from gemma_fast.kernels.launch import Gpu, gpu, launch_config, runs_triton


def geglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    return (F.gelu(gate.float(), approximate="tanh") * up.float()).to(gate.dtype)


def gate_up_geglu_reference(x: Tensor, gate_up_proj: Tensor) -> Tensor:
    gate_up = F.linear(x.float(), gate_up_proj.float())
    return geglu_reference(*gate_up.chunk(2, dim=-1)).to(x.dtype)


@triton.jit
def geglu_in_fp32(gate, up):
    """Returns gelu(gate) * up, elementwise, for fp32 tiles."""
    z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    return gate * tl.sigmoid(2 * z) * up  # (1 + tanh(z)) / 2 == sigmoid(2 z)


@triton.jit
def _geglu_kernel(
    gate_ptr,  # [rows, DIM]
    up_ptr,  # [rows, DIM]
    out_ptr,  # [rows, DIM], contiguous
    gate_row_stride,
    up_row_stride,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = cols < DIM

    gate_ptr += row * gate_row_stride
    up_ptr += row * up_row_stride
    gate = tl.load(gate_ptr + cols, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    up = tl.load(up_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * DIM + cols, geglu_in_fp32(gate, up), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _gate_up_geglu_kernel(
    x,  # [rows, HIDDEN], contiguous: a tensor descriptor if DESCRIPTORS, else a pointer
    gate_up_proj,  # [2, DIM, HIDDEN], like x
    out_ptr,  # [rows, DIM], contiguous
    rows,
    HIDDEN: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # columns of the gate, and the same ones of up
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,  # tiles of rows that share weights in the L2 cache
    DESCRIPTORS: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(DIM, BLOCK_N)
    # Flattened into one loop: a tile's first loads overlap the epilogue of the previous tile.
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = tile_at(tile, tiles_m, tiles_n, GROUP_M)
        row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
        m, n = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)  # [BLOCK_M], [BLOCK_N]

        # One matmul for gate and up: Hopper's is fastest when it is 256 columns wide.
        gate_up = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
        for k in range(0, HIDDEN, BLOCK_K):
            if DESCRIPTORS:
                a = x.load([row, k])  # [BLOCK_M, BLOCK_K]
                b = gate_up_proj.load([0, col, k])  # [2, BLOCK_N, BLOCK_K]
                b = b.reshape([2 * BLOCK_N, BLOCK_K])  # [2 * BLOCK_N, BLOCK_K]
            else:
                # [1, BLOCK_K]
                channel = (tl.multiple_of(k, BLOCK_K) + tl.arange(0, BLOCK_K))[None, :]
                weight_row = tl.arange(0, 2 * BLOCK_N)  # [2 * BLOCK_N]: gate rows, then up rows
                weight_row = weight_row // BLOCK_N * DIM + (col + weight_row % BLOCK_N) % DIM
                a_ptr = x + (m % rows).to(tl.int64)[:, None] * HIDDEN + channel
                b_ptr = gate_up_proj + weight_row.to(tl.int64)[:, None] * HIDDEN + channel
                a = tl.load(a_ptr, mask=channel < HIDDEN, other=0.0)  # [BLOCK_M, BLOCK_K]
                b = tl.load(b_ptr, mask=channel < HIDDEN, other=0.0)  # [2 * BLOCK_N, BLOCK_K]
            gate_up = tl.dot(a, b.T, gate_up, input_precision="ieee")  # [BLOCK_M, 2 * BLOCK_N]
        gate_up = gate_up.reshape([BLOCK_M, 2, BLOCK_N]).permute(0, 2, 1)  # [BLOCK_M, BLOCK_N, 2]
        gate, up = gate_up.split()  # [BLOCK_M, BLOCK_N]
        out = out_ptr + m.to(tl.int64)[:, None] * DIM + n[None, :]  # [BLOCK_M, BLOCK_N]
        tl.store(out, geglu_in_fp32(gate, up), mask=(m < rows)[:, None] & (n < DIM)[None, :])


def default_config(dim: int) -> dict[str, int]:
    """Returns the launch config of geglu."""
    block = min(triton.next_power_of_2(dim), 1024)
    return {"BLOCK": block, "num_warps": max(block // 256, 1)}


@op(fake=lambda gate, up: torch.empty_like(gate, memory_format=torch.contiguous_format))
def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Returns gelu(gate) * up. Runs the reference where Triton does not run."""
    assert gate.shape == up.shape and gate.dtype == up.dtype, (
        f"gate {tuple(gate.shape)} {gate.dtype} does not fit up {tuple(up.shape)} {up.dtype}"
    )
    if not runs_triton(gate):
        if calls.runs_c(gate) and gate.stride(-1) == up.stride(-1) == 1:
            return calls.geglu(gate, up)
        return geglu_reference(gate, up).contiguous()

    assert gate.stride(-1) == up.stride(-1) == 1, "rows must be contiguous"
    dim = gate.shape[-1]
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, up = gate.reshape(-1, dim), up.reshape(-1, dim)  # [rows, dim]
    config = launch_config("geglu", default_config(dim))
    if gate.shape[0]:
        _geglu_kernel[(gate.shape[0], triton.cdiv(dim, config["BLOCK"]))](
            gate, up, out, gate.stride(0), up.stride(0), DIM=dim, **config
        )
    return out


def gate_up_config(rows: int, itemsize: int, gpu: Gpu) -> dict[str, int]:
    """Returns the launch config of gate_up_geglu: operands fit in shared memory, and no register is
    spilled."""
    group = {"GROUP_M": 8, "num_warps": 8}
    if itemsize == 4:  # no tensor cores
        return {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32, "num_stages": 2} | group
    block_m = 64 if rows <= 64 else 128
    if gpu.shared_memory > 200_000:
        return {"BLOCK_M": block_m, "BLOCK_N": 128, "BLOCK_K": 64, "num_stages": 4} | group
    stages = 4 if gpu.shared_memory > 160_000 else 3  # with 3, two programs fit in 99 KB
    return {"BLOCK_M": block_m, "BLOCK_N": 64, "BLOCK_K": 32, "num_stages": stages} | group


@op(fake=lambda x, gate_up_proj: x.new_empty(*x.shape[:-1], gate_up_proj.shape[0] // 2))
def gate_up_geglu(x: Tensor, gate_up_proj: Tensor) -> Tensor:
    """Returns geglu of the halves of x @ gate_up_projᵀ, computed in one kernel. Runs the reference
    where Triton does not run."""
    (double, hidden), dim = gate_up_proj.shape, gate_up_proj.shape[0] // 2
    assert double == 2 * dim and x.shape[-1] == hidden, (
        f"{tuple(gate_up_proj.shape)=} does not fit {tuple(x.shape)=}"
    )
    if not runs_triton(x):
        return gate_up_geglu_reference(x, gate_up_proj)

    assert x.dtype == gate_up_proj.dtype and gate_up_proj.is_contiguous()
    assert x.is_cuda or x.dtype != torch.bfloat16, "the interpreter multiplies bf16 as integers"
    matrix = x.reshape(-1, hidden).contiguous()  # [rows, hidden]
    if matrix.data_ptr() % 16:  # descriptors and 16-byte loads need an aligned address
        matrix = matrix.clone()
    rows, limits = matrix.shape[0], gpu(x.device)
    out = torch.empty((rows, dim), dtype=x.dtype, device=x.device)
    operands: list[Any] = [matrix, gate_up_proj.view(2, dim, hidden)]
    config = gate_up_config(rows, x.element_size(), limits)
    config["DESCRIPTORS"] = limits.can_describe(*operands)
    config = launch_config("gate_up_geglu", config)
    programs = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(dim, config["BLOCK_N"])
    if rows and config["DESCRIPTORS"]:
        programs = min(programs, limits.multiprocessors)
        m, n, k = (config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        operands = list(map(TensorDescriptor.from_tensor, operands, ([m, k], [2, n, k])))
    if rows:
        _gate_up_geglu_kernel[(programs,)](*operands, out, rows, HIDDEN=hidden, DIM=dim, **config)
    return out.view(*x.shape[:-1], dim)
