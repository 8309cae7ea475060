"""The chosen experts of up to MAX_ROWS rows, see experts.py: two launches.

1. Each program multiplies rows of gate and up of one chosen expert by one row of x. The expert is
   known only after the wait for the previous kernel. Before it, the programs of the dense MLP's
   down projection fetch their weights: they come first.
2. Each program multiplies rows of all chosen experts' down projections by one row's GeGLU results.

Programs that may have the same expert follow one another, so that they share its weights in the L2
cache.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemma_fast.kernels._gemv import add_products
from gemma_fast.kernels._matmul_input import MatmulInput
from gemma_fast.kernels._matvec_block import matvec_block, row_block
from gemma_fast.kernels._op import wait_for_previous_kernel
from gemma_fast.kernels._skinny import default_config as skinny_config
from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels._weight import Seam, load_weight, unit_of
from gemma_fast.kernels.launch import gpu, launch_config
from gemma_fast.kernels.packed import Weight


class Routed(NamedTuple):
    """The router's results: pointers in kernels."""

    chosen: Any  # [rows, TOP_K], int32
    weight: Any  # [rows, TOP_K], fp32


class MatvecSpec(NamedTuple):
    """Compile-time constants of one matmul of a launch: one `tl.constexpr`."""

    dim: int
    out: int  # columns of the output
    group: int  # columns of the weight that share a scale; 0: not packed
    block_b: int  # these as in _matvec_kernel
    block_n: int
    block_k: int
    stages: int


@triton.jit
def _gate_up_of_pair(
    program, x_ptr, weight, chosen_ptr, hidden_ptr, rows, SPEC: tl.constexpr,
    TOP_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Computes a block of the result of one pair of row and slot."""
    wait_for_previous_kernel(PDL)
    pair, block = program % (rows * TOP_K), program // (rows * TOP_K)
    first_row = tl.load(chosen_ptr + pair) * (2 * SPEC.out)
    inputs = MatmulInput(x_ptr + pair // TOP_K * SPEC.dim, None, None, None, None)
    matvec_block(
        block, inputs, weight, first_row, hidden_ptr + pair * SPEC.out, None, None, None, 1,
        0.0, 0.0, SPEC.dim, SPEC.out, SPEC.group, True, 1, SPEC.block_n, SPEC.block_k,
        SPEC.stages, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _experts_gate_up_kernel(
    x_ptr,  # [rows, dim]
    weight,  # Weight [experts * 2 * out, dim]: for each expert gate, then up
    chosen_ptr,  # [rows, TOP_K]
    hidden_ptr,  # [rows, TOP_K, out]
    dense_ptr,  # [rows, dense dim] | None
    dense_weight,  # Weight [dense out, dense dim]
    dense_y_ptr,  # [rows, dense out] | None
    rows,
    SPEC: tl.constexpr,  # MatvecSpec of the experts
    DENSE: tl.constexpr,  # MatvecSpec of the dense MLP's down projection | None
    TOP_K: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0)
    if DENSE is None:
        _gate_up_of_pair(
            program, x_ptr, weight, chosen_ptr, hidden_ptr, rows, SPEC, TOP_K, PDL
        )  # fmt: skip
    else:
        DENSE_PROGRAMS: tl.constexpr = (DENSE.out + DENSE.block_n - 1) // DENSE.block_n
        if program < DENSE_PROGRAMS:
            inputs = MatmulInput(dense_ptr, None, None, None, None)
            matvec_block(
                program, inputs, dense_weight, None, dense_y_ptr, None, None, None, rows,
                0.0, 0.0, DENSE.dim, DENSE.out, DENSE.group, False, DENSE.block_b,
                DENSE.block_n, DENSE.block_k, DENSE.stages, PDL,
            )  # fmt: skip
        else:
            _gate_up_of_pair(
                program - DENSE_PROGRAMS, x_ptr, weight, chosen_ptr, hidden_ptr, rows, SPEC,
                TOP_K, PDL,
            )  # fmt: skip


@triton.jit
def _of_slot(values, slot):
    """Returns the value of a slot, of values :: [slots]. (Triton would copy scalars that a loop
    loads to shared memory, with barriers in each iteration.)"""
    return tl.sum(tl.where(tl.arange(0, values.shape[0]) == slot, values, 0), axis=0)


@triton.jit
def _load_slots(weight, chosen, n, k, SPEC: tl.constexpr, TOP_K: tl.constexpr):
    """Loads columns k … k + block_k - 1 of rows n of the chosen experts' matrices side by side."""
    slot = k // SPEC.dim
    before = _of_slot(chosen, slot) * SPEC.out - slot
    after = _of_slot(chosen, slot + 1) * SPEC.out - (slot + 1)
    seam = Seam((slot + 1) * SPEC.dim, before, after)
    return load_weight(
        weight, n, k, SPEC.dim, SPEC.group, SPEC.block_k, seam, TOP_K * SPEC.dim
    )  # fmt: skip


@triton.jit
def _load_weighted(hidden_ptr, weights, k, SPEC: tl.constexpr, TOP_K: tl.constexpr):
    """Loads columns k … k + block_k - 1 of all slots' inputs, times their slot's weight: [1,
    block_k], fp32."""
    slot, col = k // SPEC.dim, k + tl.arange(0, SPEC.block_k)[None, :]  # col :: [1, block_k]
    hidden = tl.load(hidden_ptr + col, mask=col < TOP_K * SPEC.dim, other=0.0)
    before, after = _of_slot(weights, slot), _of_slot(weights, slot + 1)
    return hidden.to(tl.float32) * tl.where(col < (slot + 1) * SPEC.dim, before, after)


@triton.jit(do_not_specialize=["rows"])
def _experts_down_kernel(
    hidden_ptr,  # [rows, TOP_K, dim]
    weight,  # Weight [experts * out, dim]
    routed,  # Routed
    y_ptr,  # [rows, out]
    rows,
    SPEC: tl.constexpr,  # MatvecSpec
    TOP_K: tl.constexpr,
    PDL: tl.constexpr,
):
    BLOCK_N: tl.constexpr = SPEC.block_n
    COLS: tl.constexpr = max(SPEC.block_k // unit_of(weight.data.dtype.element_ty), 1)
    row = tl.program_id(0) % rows
    n = tl.program_id(0) // rows * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    slots = tl.arange(0, triton.next_power_of_2(TOP_K))  # [slots]
    is_slot, place = slots < TOP_K, row * TOP_K + slots  # [slots]
    hidden_ptr += row * (TOP_K * SPEC.dim)
    # The router has written `chosen` before this kernel starts: the kernel between them has waited
    # for the router before it let this one start. It is read from the L2 cache (.cg), because the
    # L1 cache may hold what an earlier kernel has read.
    chosen = tl.load(routed.chosen + place, mask=is_slot, other=0, cache_modifier=".cg")
    first_block = _load_slots(weight, chosen, n % SPEC.out, 0, SPEC, TOP_K)
    wait_for_previous_kernel(PDL)
    weights = tl.load(routed.weight + place, mask=is_slot, other=0.0)  # [slots]
    first_x = _load_weighted(hidden_ptr, weights, 0, SPEC, TOP_K)  # [1, block_k]
    sums = tl.zeros([BLOCK_N, COLS], tl.float32)
    for k in tl.range(SPEC.block_k, TOP_K * SPEC.dim, SPEC.block_k, num_stages=SPEC.stages):
        x = _load_weighted(hidden_ptr, weights, k, SPEC, TOP_K)  # [1, block_k]
        block = _load_slots(weight, chosen, n % SPEC.out, k, SPEC, TOP_K)
        sums = add_products(sums, block, weight, x)  # [BLOCK_N, COLS]
    # The block in registers comes last, as in _gemv.py.
    sums = add_products(sums, first_block, weight, first_x)
    tl.store(y_ptr + row * SPEC.out + n, tl.sum(sums, axis=1), mask=n < SPEC.out)


def gate_up_config(
    rows: int, weight: Weight, dense: Weight | None, itemsize: int
) -> dict[str, int]:
    """Returns the launch config of the first kernel."""
    config = row_block(weight)
    if dense is not None:
        one = {"BLOCK_B": 1, **row_block(dense)}
        parts = one if rows == 1 else skinny_config(dense, itemsize)
        config |= {f"DENSE_{name}": x for name, x in parts.items() if name != "num_warps"}
    return config | {"num_warps": 4}


def down_config(weight: Weight) -> dict[str, int]:
    """Returns the launch config of the second kernel. A block has columns of one or two slots."""
    packed, width = weight.scale is not None, weight.shape[1]
    block = min(512, triton.next_power_of_2(width + 1) // 2)  # at most width
    return {"BLOCK_N": 8, "BLOCK_K": block, "STAGES": 6 if packed else 4, "num_warps": 4}


def _spec(weight: Weight, out: int, config: Mapping[str, Any], part: str = "") -> MatvecSpec:
    blocks = [config[part + name] for name in ("BLOCK_N", "BLOCK_K", "STAGES")]
    block_b = config.get(f"{part}BLOCK_B", 1)
    return MatvecSpec(weight.shape[1], out, weight.group, block_b, *blocks)


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the compiler's options of a launch config."""
    return {name: x for name, x in config.items() if name.islower()}


def expert_matvec(
    x: Tensor, gate_up: Weight, down: Weight, routed: Routed, dense: Tensor | None,
    dense_down: Weight | None, pdl: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Returns (y, dense_y) of contiguous rows, as defined in experts.py."""
    (rows, dim), top_k, width = x.shape, routed.chosen.shape[1], down.shape[1]
    pdl_options = gpu(x.device).pdl_options(pdl)
    hidden = torch.empty(rows, top_k, width, dtype=x.dtype, device=x.device)
    y = torch.empty_like(x)
    config = gate_up_config(rows, gate_up, dense_down, x.element_size())
    config = launch_config("experts_gate_up", config)
    spec = _spec(gate_up, width, config)
    programs = rows * top_k * triton.cdiv(2 * width, spec.block_n)
    dense_y, dense_spec = None, None
    if dense_down is not None:
        dense_y = torch.empty_like(x)
        dense_spec = _spec(dense_down, dim, config, "DENSE_")
        programs += triton.cdiv(dim, dense_spec.block_n)
    _experts_gate_up_kernel[(programs,)](
        x, gate_up, routed.chosen, hidden, dense, dense_down or Weight(None), dense_y, rows,
        SPEC=spec, DENSE=dense_spec, TOP_K=top_k, **_options(config), **pdl_options,
    )  # fmt: skip
    config = launch_config("experts_down", down_config(down))
    spec = _spec(down, dim, config)
    _experts_down_kernel[(rows * triton.cdiv(dim, spec.block_n),)](
        hidden, down, routed, y, rows,
        SPEC=spec, TOP_K=top_k, **_options(config), **pdl_options,
    )  # fmt: skip
    return y, dense_y
