"""Compares norm_router with fp64."""

import pytest
import torch
from kernel_checks import DTYPES, strided
from marks import slow
from matvec_checks import EPS, check_norm_linear, norm, packed_weight_of, weight_of
from oracles import root_sum_square
from tolerances import assert_rounded, norm_roundings, rounding_error

from gemma_fast.kernels._skinny import MAX_ROWS
from gemma_fast.kernels.launch import runs_triton
from gemma_fast.kernels.packed import Packing
from gemma_fast.kernels.router import norm_router

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# (dim, columns of the dense MLP, experts, top k)
SHAPES = [(48, 20, 6, 3), (1160, 15, 5, 1), (100, 33, 16, 16), (256, 12, 37, 8)]


def inputs(rows, dim, ffn, experts, dtype, device, packing=None):
    """Returns the tensors of norm_router up to per_expert_scale; and in fp64 gate_up_proj, and the
    size of its terms. The router's logits are about normal(0, 4)."""
    x = 3 * torch.randn(rows, dim, device=device).to(dtype)
    residual = torch.randn(rows, dim, device=device).to(dtype)
    norms = torch.randn(4, dim, device=device).to(dtype)
    if packing is None:
        gate_up = exact = size = weight_of(2 * ffn, dim, dtype, device)
    else:
        gate_up, exact, size = packed_weight_of(2 * ffn, dim, packing, device)
    proj = 2 * torch.randn(experts, dim, device=device).to(dtype)
    per_expert_scale = torch.linspace(0.5, 2, experts, device=device).to(dtype)
    given = x, residual, norms[0], norms[1], gate_up, norms[2], norms[3], proj, per_expert_scale
    return given, exact, size


def run(given, top_k, offset=0.0):
    counter = torch.zeros(MAX_ROWS, dtype=torch.int32, device=given[0].device)
    found = norm_router(*given, counter, top_k=top_k, eps=EPS, offset=offset)
    assert not counter.any(), "the kernel did not reset its counter"
    return found


def route(h, scale, proj, per_expert_scale, top_k, mistake=""):
    """Returns (chosen, weight) in fp64, and the logits' size, [rows, 1]: that of their sums."""
    dim = h.shape[-1]
    eps = 1.01 * EPS if mistake == "epsilon" else EPS
    x = h.double() * (h.double().square().mean(-1, keepdim=True) + eps).rsqrt()
    if mistake != "scale left out":
        x = x * scale.double()
    if mistake != "not divided by sqrt(dim)":
        x = x * dim**-0.5
    if mistake == "input rounded":
        x = x.half().double()
    logits = x @ proj.double().T
    size = root_sum_square(x, proj).amax(-1, keepdim=True)
    p = logits.softmax(-1)
    order = p.sort(dim=-1, descending=mistake != "least first", stable=True).indices
    chosen = order[..., :top_k]
    weight = p.gather(-1, chosen)
    if mistake != "not renormalized":
        weight = weight / weight.sum(-1, keepdim=True)
    if mistake != "per_expert_scale left out":
        weight = weight * per_expert_scale.double()[chosen if mistake != "scale of slot" else 0]
    ranked = logits.gather(-1, order)[..., : top_k + 1]  # those next to each other must differ
    gap = (ranked[..., :-1] - ranked[..., 1:]).abs().min() if logits.shape[-1] > 1 else 1
    return chosen, weight, size, gap


def check_route(chosen, weight, h, scale, proj, per_expert_scale):
    exact_chosen, exact, size, gap = route(h, scale, proj, per_expert_scale, chosen.shape[-1])
    roundings = norm_roundings(h.shape[-1]) + h.shape[-1]
    assert gap > 2 * rounding_error(roundings) * size.max(), "choose other inputs: a near tie"
    assert chosen.dtype == torch.int32 and weight.dtype == torch.float32
    assert torch.equal(chosen.long(), exact_chosen), "other experts are chosen"
    # An error of a logit is a relative error of p, and of the sum over the chosen.
    assert_rounded(weight, exact, roundings + proj.shape[0] + 16, 2 * size * exact.abs())


def check(found, given, exact, size=None, weight_steps=0, offset=0.0):
    """exact, size, weight_steps: as in check_norm_linear, for gate_up_proj."""
    h, dense, expert_input, chosen, weight = found
    x, residual, post_weight, norm_weight, _, expert_norm_weight, *router = given
    check_norm_linear(
        (dense, h), x, residual, norm_weight, post_weight, exact, geglu=True, offset=offset,
        size=size, weight_steps=weight_steps,
    )  # fmt: skip
    assert expert_input.dtype == x.dtype
    expected = norm(h, expert_norm_weight, offset)
    assert_rounded(expert_input, expected, norm_roundings(x.shape[-1]))
    check_route(chosen, weight, h, *router)


@DTYPE
@pytest.mark.parametrize("rows", [1, 2, 5, MAX_ROWS, MAX_ROWS + 9], ids="rows {}".format)
@pytest.mark.parametrize(("dim", "ffn", "experts", "top_k"), SHAPES, ids=str)
def test_norm_router_equals_fp64(dim, ffn, experts, top_k, rows, dtype, device, poison_outputs):
    given, exact, _ = inputs(rows, dim, ffn, experts, dtype, device)
    check(run(given, top_k), given, exact)


@pytest.mark.parametrize("rows", [1, 3], ids="rows {}".format)
def test_norms_with_an_offset_equal_fp64(rows, device, poison_outputs):
    given, exact, _ = inputs(rows, 96, 20, 7, torch.float32, device)
    check(run(given, 2, offset=1.0), given, exact, offset=1.0)
    with pytest.raises(AssertionError, match="times its bound"):
        check(run(given, 2, offset=1.0), given, exact, offset=0.0)


@pytest.mark.parametrize("rows", [1, 3, *slow(8)], ids="rows {}".format)
@pytest.mark.parametrize(
    "packing",
    [
        Packing(4, 32, False, torch.float16),
        Packing(4, 96, True, torch.bfloat16),
        Packing(8, 16, True, torch.float16),
        Packing(8, 192, False, torch.float32),
    ],
    ids=str,
)
def test_norm_router_with_packed_weights_equals_fp64(packing, rows, device, poison_outputs):
    given, exact, size = inputs(rows, 192, 20, 7, torch.float32, device, packing)
    steps = int(rows > 1 or not runs_triton(given[0]))
    check(run(given, 3), given, exact, size, steps)


MISTAKES = [
    "epsilon", "scale left out", "not divided by sqrt(dim)", "input rounded", "least first",
    "not renormalized", "per_expert_scale left out", "scale of slot", "router reads normed input",
    "experts read the dense input", "post-norm left out", "halves of gate_up_proj swapped",
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_check_detects_a_mistake(mistake):
    given, exact, _ = inputs(4, 640, 15, 12, torch.float32, "cpu")
    x, residual, _, norm_weight, gate_up, _, *router = given
    h, dense, expert_input, chosen, weight = run(given, 3)
    check((h, dense, expert_input, chosen, weight), given, exact)
    if mistake == "experts read the dense input":
        expert_input = norm(h, norm_weight, 0.0).float()
    elif mistake == "post-norm left out":
        h, dense, *_ = run((x, residual, torch.ones_like(norm_weight), *given[3:]), 3)
    elif mistake == "halves of gate_up_proj swapped":
        _, dense, *_ = run((*given[:4], gate_up.roll(15, 0), *given[5:]), 3)
    elif mistake == "router reads normed input":
        chosen, weight, *_ = route(norm(h, norm_weight, 0.0), *router, 3)
    else:
        chosen, weight, *_ = route(h, *router, 3, mistake)
    with pytest.raises(AssertionError, match=r"times its bound|other experts"):
        check((h, dense, expert_input, chosen.int(), weight.float()), given, exact)


@pytest.mark.parametrize("rows", [1, 3, MAX_ROWS + 3], ids="rows {}".format)
def test_the_expert_of_lower_index_comes_first_in_a_tie(rows, device):
    """A row of the router's weight has one element that is not 0, so equal logits have equal
    bits."""
    given, *_ = inputs(rows, 64, 8, 21, torch.float32, device)
    *given, scale, proj, per_expert_scale = given
    proj.zero_()
    h = run((*given, scale, proj, per_expert_scale), 5)
    assert h[3].tolist() == [[0, 1, 2, 3, 4]] * rows
    assert_rounded(h[4], (per_expert_scale[:5] / 5).double().expand(rows, 5), 8)
    sign = torch.where(h[0][:, 3] * scale[3] > 0, 1.0, -1.0)  # of the logits below
    proj[[4, 9, 17], 3], proj[[2, 20], 3] = 3.0, 2.0
    best = [4, 9, 17, 2, 20] + [0, 1]
    found = run((*given, scale, proj, per_expert_scale), 7)[3]
    for row in range(rows):
        others = [i for i in range(21) if i not in best[:5]]
        expected = best if sign[row] > 0 else others[:7]
        assert found[row].tolist() == expected


@pytest.mark.parametrize("rows", [1, 4, MAX_ROWS + 2], ids="rows {}".format)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_row_of_nan_chooses_experts_in_range(bad, rows, device):
    given, exact, _ = inputs(rows, 64, 8, 21, torch.float32, device)
    given[0][0, 5] = bad
    found = run(given, 4)
    assert found[3].min() >= 0 and found[3].max() < 21 and found[4][0].isnan().all()
    assert len(set(found[3][0].tolist())) == 4
    if rows > 1:
        others = [x[1:] for x in given[:2]]
        check([x[1:] for x in found], (*others, *given[2:]), exact)


@pytest.mark.parametrize("rows", [1, 6, MAX_ROWS + 5], ids="rows {}".format)
def test_the_same_inputs_give_the_same_bits(rows, device):
    given, *_ = inputs(rows, 640, 24, 16, torch.float32, device)
    for once, again in zip(run(given, 4), run(given, 4), strict=True):
        assert torch.equal(once, again)


def test_batched_strided_rows_equal_fp64(device, poison_outputs):
    given, exact, _ = inputs(1, 64, 10, 7, torch.float32, device)
    for shape in ((2, 3, 64), (1, 1, 64), (3, 5, 64), (0, 2, 64)):
        x, residual = (strided(shape, torch.float32, device) for _ in range(2))
        found = run((x, residual, *given[2:]), 2)
        shapes = [(*shape[:-1], n) for n in (64, 10, 64, 2, 2)]
        assert [x.shape for x in found] == shapes
        if x.numel():
            flat = (x.flatten(0, 1), residual.flatten(0, 1), *given[2:])
            check([x.flatten(0, 1) for x in found], flat, exact)


def test_large_logits_give_finite_weights(device):
    given, *_ = inputs(2, 64, 8, 9, torch.float32, device)
    given[7].mul_(1e4)
    weight = run(given, 3)[4]
    assert weight.isfinite().all() and (weight.amax(-1) >= 0.5).all()


def test_wrong_shapes_raise(device):
    given, *_ = inputs(2, 64, 8, 9, torch.float32, device)
    for wrong, top_k in (
        ((*given[:7], given[7][:, :32], given[8]), 3),
        ((*given[:8], given[8][:5]), 3),
        (given, 10),
        (given, 0),
        ((*given[:7], given[7].half(), given[8]), 3),
    ):
        with pytest.raises(AssertionError):
            run(wrong, top_k)
    with pytest.raises(AssertionError, match="rows"):
        norm_router(*given, torch.zeros(1, dtype=torch.int32, device=device), top_k=2)
