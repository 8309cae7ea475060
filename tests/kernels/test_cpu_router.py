"""Compares the C kernel of a mixture of experts' router with fp64."""

import itertools

import pytest
import torch
from c_kernels import BUILDS, built_for, needs_c
from cpu_tensors import DTYPES, same_bits, threads, unaligned
from matvec_checks import check_norm_linear
from mixture_checks import check_expert_input, check_router, router_inputs

from gemma_fast.kernels import router as router_file
from gemma_fast.kernels.router import choose_experts_reference, norm_router, router_reference

pytestmark = needs_c
EPS = 1e-2  # large enough to change the norms' results
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# (experts, top_k, dim): odd sizes; all experts; several chunks
SIZES = [(6, 3, 48), (6, 1, 37), (6, 6, 48), (1, 1, 7), (64, 8, 640)]


@pytest.fixture(params=BUILDS)
def build(request, monkeypatch):
    """Lets only the C kernels compute."""
    monkeypatch.setattr(router_file, "router_reference", None)
    with built_for(request.param):
        yield


def check_norm_router(found, given, offset=1.0):
    h, dense, expert_input, chosen, weight = found
    x, residual, post_norm, norm, gate_up, expert_norm, *router, _ = given
    check_norm_linear(
        (dense, h), x, residual, norm, post_norm, gate_up, geglu=True, offset=offset
    )  # fmt: skip
    check_expert_input(expert_input, h, expert_norm, EPS, offset)
    check_router(chosen, weight, h, *router, EPS)


@DTYPE
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_router_equals_fp64(size, dtype, build, poison_outputs):
    """64 rows are computed at a time."""
    count, top_k, dim = size
    for rows, offset in itertools.product((1, 3, 16, 17, 130), (0.0, 1.0)):
        given = router_inputs(rows, dim, 40, count, dtype)
        found = norm_router(*given, top_k=top_k, eps=EPS, offset=offset)
        check_norm_router(found, given, offset)


def test_router_at_true_size_equals_fp64(build, poison_outputs):
    given = router_inputs(2, 2816, 32, 128, torch.bfloat16)
    check_norm_router(norm_router(*given, top_k=8, eps=EPS), given)


# Arguments h, scale, proj and per_expert_scale of router_reference → wrong ones.
MISTAKES = {
    "none": lambda h, scale, proj, factor: (h, scale, proj, factor),
    "scale ignored": lambda h, scale, proj, factor: (h, scale / scale, proj, factor),
    "factors of the experts ignored": lambda h, scale, proj, factor: (h, scale, proj, factor**0),
    "norm's weight": lambda h, scale, proj, factor: (h, scale * (1 + scale), proj, factor),
    "experts": lambda h, scale, proj, factor: (h, scale, proj.roll(1, 0), factor),
}


@pytest.mark.parametrize("mistake", [*MISTAKES, "no eps", "input rounded", "not renormalized"])
def test_mistakes_of_a_router_are_found(mistake):
    h = (0.1 * torch.randn(20, 640)).bfloat16()
    given = h, *router_inputs(1, 640, 8, 16, torch.bfloat16)[6:9]
    wrong = MISTAKES.get(mistake, MISTAKES["none"])(*given)
    chosen, weight = router_reference(*wrong, top_k=4, eps=0.0 if mistake == "no eps" else EPS)
    if mistake == "input rounded":
        h, scale, proj, factors = given
        x = h.float() * torch.rsqrt(h.float().square().mean(-1, keepdim=True) + EPS)
        logits = (x * scale * 640**-0.5).bfloat16().float() @ proj.float().T
        chosen, weight = choose_experts_reference(logits, factors, 4)
    if mistake == "not renormalized":
        weight = weight * 0.999
    if mistake == "none":
        check_router(chosen, weight, *given, EPS)
        return
    with pytest.raises(AssertionError):
        check_router(chosen, weight, *given, EPS)


@DTYPE
@pytest.mark.parametrize("rows", [1, 5, 17], ids="rows {}".format)
def test_of_equal_experts_the_lower_index_comes_first(rows, dtype, build):
    given = router_inputs(rows, 48, 40, 6, dtype)
    proj, factors = given[7:9]
    proj[:] = proj[0].clone()
    *_, chosen, weight = norm_router(*given, top_k=4, eps=EPS)
    assert chosen.tolist() == [[0, 1, 2, 3]] * rows
    assert torch.equal(weight, (factors[:4].float() / 4).expand(rows, -1))
    proj[[3, 5]], proj[4] = -proj[:2], 0  # three experts, two, and one
    found = norm_router(*given, top_k=6, eps=EPS)
    assert all(row in ([0, 1, 2, 4, 3, 5], [3, 5, 4, 0, 1, 2]) for row in found[3].tolist())
    check_norm_router(found, given)


@DTYPE
@pytest.mark.parametrize("rows", [1, 5, 70], ids="rows {}".format)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_nan_makes_the_weights_of_its_row_nan(value, rows, dtype, build):
    given = router_inputs(rows, 48, 40, 6, dtype)
    expected = norm_router(*given, top_k=3)
    given[1] = given[1].clone()
    given[1][0, 5] = value
    *_, chosen, weight = norm_router(*given, top_k=3)
    assert weight[0].isnan().all() and same_bits(weight[1:], expected[4][1:])
    assert len({*chosen[0].tolist()} & {*range(6)}) == 3
    given[1], given[7] = given[0], given[7].clone()
    given[7][2, 3] = value  # the logit of expert 2 is NaN, inf or -inf
    *_, chosen, weight = norm_router(*given, top_k=3)
    assert (weight.isnan().all(-1) | (value > 0) & ~(chosen == 2).any(-1)).all()
    assert chosen.min() >= 0 and chosen.max() < 6


@DTYPE
def test_results_do_not_depend_on_the_number_of_threads(dtype, build):
    for rows in (1, 5, 16):
        given, found = router_inputs(rows, 640, 96, 64, dtype), []
        for count in (1, 2, 3):
            with threads(count):
                results = norm_router(*given, top_k=8)
                found.append(torch.cat([part.float() for part in results], dim=-1))
        assert same_bits(*found)


@DTYPE
@pytest.mark.parametrize("shape", [(2, 3), (7, 10)], ids=str)
def test_layouts_and_unaligned_tensors(shape, dtype, build, poison_outputs):
    given = router_inputs(shape[0] * shape[1], 48, 40, 6, dtype)
    expected = norm_router(*given, top_k=3, eps=EPS)
    x, residual, *rest = given
    x, residual = (
        torch.stack((x, x), 1)[:, 0].view(*shape, -1),
        unaligned(residual.view(*shape, -1)),
    )
    found = norm_router(x, residual, *map(unaligned, rest[:-1]), rest[-1], top_k=3, eps=EPS)
    assert all(y.shape[:2] == shape for y in found)
    assert all(map(torch.equal, (y.flatten(0, 1) for y in found), expected))


def test_rows_may_be_empty(build):
    given = router_inputs(0, 48, 40, 6, torch.float32)
    shapes = [tuple(y.shape) for y in norm_router(*given, top_k=3)]
    assert shapes == [(0, 48), (0, 40), (0, 48), (0, 3), (0, 3)]
