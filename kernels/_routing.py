"""Kernels of the router, see router.py."""

from typing import Any, NamedTuple

from gemma_fast.kernels._matmul_input import MatmulInput, load_h, norm_scales
from gemma_fast.kernels._matvec_block import matvec_block
from gemma_fast.kernels._op import wait_for_previous_kernel
from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels.rmsnorm import add_offset


class Router(NamedTuple):
    """Pointers to the router's weights, its logits and its results."""

    scale: Any  # [DIM]
    proj: Any  # [EXPERTS, DIM]
    per_expert_scale: Any  # [EXPERTS]
    logits: Any  # [rows, EXPERTS]
    chosen: Any  # [rows, TOP_K]
    weight: Any  # [rows, TOP_K]


class RouterSpec(NamedTuple):
    """Compile-time constants of the router: one `tl.constexpr`."""

    experts: int
    top_k: int
    dim: int
    eps: float  # epsilon of the norms
    offset: float  # the norms with weights multiply by offset + weight


@triton.jit
def choose_experts(router, row, SPEC: tl.constexpr):
    """Stores the chosen experts of one row, and their weights, from the row's logits."""
    EXPERTS: tl.constexpr = SPEC.experts
    BLOCK: tl.constexpr = triton.next_power_of_2(EXPERTS)
    expert = tl.arange(0, BLOCK)  # [BLOCK]
    mask = expert < EXPERTS
    per_expert_scale = tl.load(router.per_expert_scale + expert, mask=mask, other=0.0)  # [BLOCK]
    logits = tl.load(router.logits + row * EXPERTS + expert, mask=mask, other=float("-inf"))
    p = tl.exp(logits - tl.max(logits, axis=0))  # [BLOCK]
    p = p / tl.sum(p, axis=0)
    # An expert's rank is the number of experts before it. NaN counts as 0, so that ranks differ.
    order = tl.where(p == p, p, 0.0)  # [BLOCK]
    larger = order[:, None] > order[None, :]  # [BLOCK, BLOCK]
    equal = (order[:, None] == order[None, :]) & (expert[:, None] < expert[None, :])
    rank = tl.sum((larger | equal).to(tl.int32), axis=0)  # [BLOCK]
    is_chosen = (rank < SPEC.top_k) & mask
    total = tl.sum(tl.where(is_chosen, p, 0.0), axis=0)
    weight = p / total * per_expert_scale.to(tl.float32)  # [BLOCK]
    place = row * SPEC.top_k + rank  # [BLOCK]
    tl.store(router.chosen + place, expert, mask=is_chosen)
    tl.store(router.weight + place, weight, mask=is_chosen)


@triton.jit
def _route_row(
    program, inputs, router, counter_ptr, expert_norm_weight_ptr, h_ptr, expert_input_ptr, rows,
    SPEC: tl.constexpr, BLOCK_E: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Computes the logits of one row for a block of experts. The last program of the row to do so
    chooses the experts. The first block stores h and the experts' input."""
    EXPERTS: tl.constexpr = SPEC.experts
    DIM: tl.constexpr = SPEC.dim
    BLOCK: tl.constexpr = triton.next_power_of_2(DIM)
    row, block = program % rows, program // rows
    expert = block * BLOCK_E + tl.arange(0, BLOCK_E)[:, None]  # [BLOCK_E, 1]
    col = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    mask = col < DIM  # [1, BLOCK]
    # [BLOCK_E, BLOCK]
    proj = tl.load(router.proj + expert % EXPERTS * DIM + col, mask=mask, other=0.0)
    scale = tl.load(router.scale + col, mask=mask, other=0.0)  # [1, BLOCK]
    wait_for_previous_kernel(PDL)

    inputs = MatmulInput(
        inputs.x + row * DIM, inputs.residual + row * DIM, None, inputs.post_norm_weight, None
    )
    scales = norm_scales(inputs, None, 1, False, SPEC.eps, SPEC.offset, DIM, 1, BLOCK)
    # [1, BLOCK]
    h = load_h(inputs, scales, tl.zeros([1, 1], tl.int32), col, mask, SPEC.offset, DIM)
    norm = tl.rsqrt(tl.sum(h * h, axis=1, keep_dims=True) / DIM + SPEC.eps)  # [1, 1]
    logits = tl.sum(proj.to(tl.float32) * (h * scale.to(tl.float32)), axis=1, keep_dims=True)
    logits *= norm * DIM**-0.5  # [BLOCK_E, 1]
    tl.store(router.logits + row * EXPERTS + expert, logits, mask=expert < EXPERTS)
    tl.debug_barrier()  # all threads have stored before one of them increments the counter
    before = tl.atomic_add(counter_ptr + row, 1, sem="acq_rel", scope="gpu")
    if before == tl.cdiv(EXPERTS, BLOCK_E) - 1:
        choose_experts(router, row, SPEC)
        tl.store(counter_ptr + row, 0)
    if block == 0:
        norm_weight = tl.load(expert_norm_weight_ptr + col, mask=mask, other=0.0)  # [1, BLOCK]
        tl.store(h_ptr + row * DIM + col, h, mask=mask)
        expert_input = h * norm * add_offset(norm_weight, SPEC.offset)  # [1, BLOCK]
        tl.store(expert_input_ptr + row * DIM + col, expert_input, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _norm_router_kernel(
    inputs,  # MatmulInput
    weight,  # Weight [2 * OUT, DIM], gate then up
    router,  # Router
    counter_ptr,  # [rows]: programs that have stored their logits
    expert_norm_weight_ptr,  # [DIM]
    dense_ptr,  # [rows, OUT]
    h_ptr,  # [rows, DIM]
    expert_input_ptr,  # [rows, DIM]
    rows,
    SPEC: tl.constexpr,  # RouterSpec
    OUT: tl.constexpr,
    GROUP: tl.constexpr,  # columns that share a scale; 0: the weight is not packed
    BLOCK_E: tl.constexpr,  # experts per program
    BLOCK_B: tl.constexpr,  # these as in _matvec_kernel
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0)
    routers = rows * tl.cdiv(SPEC.experts, BLOCK_E)  # programs
    if program < routers:
        _route_row(
            program, inputs, router, counter_ptr, expert_norm_weight_ptr, h_ptr, expert_input_ptr,
            rows, SPEC, BLOCK_E, PDL,
        )  # fmt: skip
    else:
        matvec_block(
            program - routers, inputs, weight, None, dense_ptr, None, None, None, rows,
            SPEC.eps, SPEC.offset, SPEC.dim, OUT, GROUP, True, BLOCK_B, BLOCK_N, BLOCK_K, STAGES,
            PDL,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _router_kernel(
    h_ptr,  # [rows, DIM], contiguous
    router,  # Router
    rows,
    SPEC: tl.constexpr,  # RouterSpec
    BLOCK_M: tl.constexpr,  # rows
    BLOCK_K: tl.constexpr,
):
    EXPERTS: tl.constexpr = SPEC.experts
    DIM: tl.constexpr = SPEC.dim
    BLOCK_E: tl.constexpr = max(triton.next_power_of_2(EXPERTS), 16)
    first = tl.program_id(0) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    expert = tl.arange(0, BLOCK_E)  # [BLOCK_E]
    h_row = (row % rows).to(tl.int64) * DIM  # [BLOCK_M, 1]
    logits = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    square = tl.zeros([BLOCK_M, 1], tl.float32)
    for k in range(0, DIM, BLOCK_K):
        col = k + tl.arange(0, BLOCK_K)[None, :]  # [1, BLOCK_K]
        mask = col < DIM
        h = tl.load(h_ptr + h_row + col, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_K]
        scale = tl.load(router.scale + col, mask=mask, other=0.0).to(tl.float32)  # [1, BLOCK_K]
        # [BLOCK_E, BLOCK_K]
        proj = tl.load(router.proj + (expert % EXPERTS)[:, None] * DIM + col, mask=mask, other=0.0)
        square += tl.sum(h * h, axis=1, keep_dims=True)  # [BLOCK_M, 1]
        # [BLOCK_M, BLOCK_E]
        logits = tl.dot(h * scale, proj.to(tl.float32).T, logits, input_precision="ieee")
    logits *= tl.rsqrt(square / DIM + SPEC.eps) * DIM**-0.5
    pointer = router.logits + row * EXPERTS + expert[None, :]  # [BLOCK_M, BLOCK_E]
    tl.store(pointer, logits, mask=(row < rows) & (expert < EXPERTS)[None, :])
    tl.debug_barrier()  # only this program reads these logits
    for i in range(first, tl.minimum(first + BLOCK_M, rows)):
        choose_experts(router, i, SPEC)
