"""Compares the C kernels of a mixture of experts with fp64: the router, and the experts of few rows
and of prompts."""

import itertools

import pytest
import torch
from c_kernels import BUILDS, built_for, needs_c
from cpu_tensors import DTYPES, same_bits, threads, unaligned
from kernel_checks import strided
from matvec_checks import check_linear, check_norm_linear, packed_weight_of, weight_of
from mixture_checks import check_expert_input, check_experts, check_router

from gemma_fast.kernels import experts as experts_file
from gemma_fast.kernels import router as router_file
from gemma_fast.kernels.cpu import experts as cpu
from gemma_fast.kernels.cpu.calls import MAX_ROWS
from gemma_fast.kernels.cpu.replay import Replay
from gemma_fast.kernels.experts import experts, experts_reference
from gemma_fast.kernels.packed import Packing, Weight
from gemma_fast.kernels.router import norm_router, router_reference

pytestmark = needs_c
EPS = 1e-2  # large enough to change the norms' results
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
BUILD = pytest.mark.parametrize("build", BUILDS, indirect=True)
# (experts, top_k, dim, width): odd sizes; one expert; all of them; several chunks
SIZES = [
    (6, 3, 48, 40), (6, 1, 37, 13), (6, 6, 48, 40), (1, 1, 7, 5), (40, 1, 64, 24),
    (16, 8, 640, 352),
]  # fmt: skip
SIZE = pytest.mark.parametrize("size", SIZES, ids=str)
# 2 and more rows share experts. From 17 rows on, a library multiplies, if the experts are few.
ROWS = [1, 2, 3, 5, 16, 17, 70]
INT8, INT4 = Packing(8, 32, False, torch.half), Packing(4, 32, False, torch.half)
WITH_MINIMUM = Packing(4, 64, True, torch.half), Packing(8, 16, True, torch.float32)
# Of gate_up and down.
PACKINGS = {
    "int4": (INT4, INT4), "int8": (INT8, INT8), "int4, int8": (INT4, INT8),
    "int8, int4 with minimum": (INT8, WITH_MINIMUM[0]), "minimum": WITH_MINIMUM,
    "int4 with minimum, not packed": (WITH_MINIMUM[0], None), "not packed, int4": (None, INT4),
}  # fmt: skip


@pytest.fixture(params=["native"])
def build(request, monkeypatch):
    """Lets only the C kernels compute."""
    for module, name in (
        (experts_file, "experts_reference"), (router_file, "router_reference"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, None)
    with built_for(request.param):
        yield


def router_inputs(rows, dim, ffn, count, dtype):
    """Returns the arguments of norm_router. Logits are about 1, so that weights differ."""
    x, residual = torch.randn(2, rows, dim).to(dtype)
    norms = torch.rand(3, dim) + 0.5
    proj = (3 * torch.randn(count, dim)).to(dtype)
    scales = (torch.rand(dim) + 0.5).to(dtype), (torch.rand(count) + 0.5).to(dtype)
    gate_up, counter = weight_of(2 * ffn, dim, dtype, "cpu"), torch.zeros(8, dtype=torch.int32)
    return [x, residual, *norms[:2], gate_up, norms[2], scales[0], proj, scales[1], counter]


def check_norm_router(found, given, offset):
    h, dense, expert_input, chosen, weight = found
    x, residual, post_norm, norm, gate_up, expert_norm, scale, proj, per_expert_scale, _ = given
    post = {"geglu": True, "offset": offset}
    check_norm_linear((dense, h), x, residual, norm, post_norm, gate_up, **post)
    check_expert_input(expert_input, h, expert_norm, EPS, offset)
    check_router(chosen, weight, h, scale, proj, per_expert_scale, EPS)


def expert_weight(out, dim, packing, dtype):
    """Returns a weight, and in fp64 its elements and their size."""
    if packing is None:
        weight = weight_of(out, dim, dtype, "cpu")
        return weight, weight.double(), None
    return packed_weight_of(out, dim, packing, "cpu")


def routed(rows, count, top_k):
    """Returns chosen and weight :: [rows, top_k]."""
    chosen = torch.rand(rows, count).argsort()[:, :top_k].int()
    return chosen, torch.rand(rows, top_k) + 0.1


def steps_of(rows, count, top_k, packed=False):
    """Returns how many results are rounded to x.dtype before y."""
    by_c = rows <= MAX_ROWS or rows * top_k <= cpu.FEW * count
    return 1 if by_c else 3 + 2 * packed


@DTYPE
@SIZE
@BUILD
def test_router_equals_fp64(size, dtype, build, poison_outputs):
    count, top_k, dim, ffn = size
    for rows, offset in itertools.product((1, 3, 16, 17, 130), (0.0, 1.0)):
        given = router_inputs(rows, dim, ffn, count, dtype)
        check_norm_router(norm_router(*given, top_k=top_k, eps=EPS, offset=offset), given, offset)


def test_router_at_true_size_equals_fp64(build, poison_outputs):
    given = router_inputs(2, 2816, 32, 128, torch.bfloat16)
    check_norm_router(norm_router(*given, top_k=8, eps=EPS, offset=0.0), given, 0.0)


MISTAKES = {
    "input rounded": lambda h, scale, proj, per: (h, scale, proj, per, True),
    "scale ignored": lambda h, scale, proj, per: (h, scale / scale, proj, per, False),
    "factor of each expert ignored": lambda h, scale, proj, per: (h, scale, proj, per / per, False),
    "input not normalized": lambda h, scale, proj, per: (h * h.norm(), scale, proj, per, False),
}


@pytest.mark.parametrize("mistake", [None, *MISTAKES, "not renormalized"])
def test_mistakes_of_a_router_are_found(mistake):
    dtype, h = torch.bfloat16, torch.randn(20, 640).bfloat16()
    scale, proj, per_expert = router_inputs(1, 640, 8, 16, dtype)[6:9]
    given = scale, proj, per_expert
    rounded, eps = False, EPS if mistake != "input not normalized" else 1e6
    if mistake in MISTAKES:
        *given, rounded = MISTAKES[mistake](h, *given)
        h_given, *given = given
    else:
        h_given = h
    chosen, weight = router_reference(h_given, *given, top_k=4, eps=eps)
    if rounded:
        x = h.double() * torch.rsqrt(h.double().square().mean(-1, keepdim=True) + EPS)
        logits = (x * scale.double() * 640**-0.5).bfloat16().float() @ proj.float().T
        chosen, weight = router_file.choose_experts_reference(logits, per_expert, 4)
    if mistake == "not renormalized":
        weight = weight * 0.9
    if mistake is None:
        check_router(chosen, weight, h, scale, proj, per_expert, EPS)
        return
    with pytest.raises(AssertionError):
        check_router(chosen, weight, h, scale, proj, per_expert, EPS)


@DTYPE
@BUILD
@pytest.mark.parametrize("rows", [1, 5, 17], ids="rows {}".format)
def test_of_equal_experts_the_lower_index_comes_first(rows, dtype, build):
    given = router_inputs(rows, 48, 40, 6, dtype)
    given[7][:] = given[7][0]
    *_, chosen, weight = norm_router(*given, top_k=4, eps=EPS)
    assert chosen.tolist() == [[0, 1, 2, 3]] * rows
    assert torch.equal(weight, (given[8][:4].float() / 4).expand(rows, -1))
    given[7][4] = 0  # now two pairs of equal experts, and one alone
    given[7][3] = -given[7][3]
    given[7][5] = given[7][3]
    h, *_, chosen, weight = norm_router(*given, top_k=6, eps=EPS)
    assert all(row in ([0, 1, 2, 4, 3, 5], [3, 5, 4, 0, 1, 2]) for row in chosen.tolist())
    check_router(chosen, weight, h, *given[6:9], EPS)


@DTYPE
@BUILD
@pytest.mark.parametrize("rows", [1, 5, 70], ids="rows {}".format)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_nan_makes_the_weights_of_its_row_nan(value, rows, dtype, build):
    given = router_inputs(rows, 48, 40, 6, dtype)
    expected = norm_router(*given, top_k=3)
    given[1] = given[1].clone()
    given[1][0, 5] = float(value)
    *_, chosen, weight = norm_router(*given, top_k=3)
    assert weight[0].isnan().all() and same_bits(weight[1:], expected[4][1:])
    assert sorted({*chosen[0].tolist()} & {*range(6)}) == sorted(chosen[0].tolist())
    given[7][2, 3] = float(value)  # now a logit of each row
    *_, chosen, weight = norm_router(*given, top_k=3)
    top = weight.isnan().all(-1) | ~(chosen == 2).any(-1)  # or -inf, which is not chosen
    assert top.all() and chosen.min() >= 0 and chosen.max() < 6


@DTYPE
@SIZE
@BUILD
def test_experts_equal_fp64(size, dtype, build, poison_outputs):
    count, top_k, dim, width = size
    gate_up, exact_up, _ = expert_weight(count * 2 * width, dim, None, dtype)
    down, exact_down, _ = expert_weight(count * dim, width, None, dtype)
    for rows in ROWS:
        x, (chosen, weight) = torch.randn(rows, dim).to(dtype), routed(rows, count, top_k)
        y, dense_y = experts(x, gate_up, down, chosen, weight)
        steps = steps_of(rows, count, top_k)
        check_experts(y, x, exact_up, exact_down, chosen, weight, steps=steps)
        assert dense_y.shape == (0,)


@DTYPE
@pytest.mark.parametrize("packings", PACKINGS.values(), ids=PACKINGS)
@BUILD
def test_packed_experts_equal_fp64(packings, dtype, build, poison_outputs):
    """Weights of few rows are not rounded to x's dtype."""
    count, top_k, dim, width = 5, 2, 192, 64
    gate_up, exact_up, up_size = expert_weight(count * 2 * width, dim, packings[0], dtype)
    down, exact_down, down_size = expert_weight(count * dim, width, packings[1], dtype)
    for rows in ROWS:
        x, (chosen, weight) = torch.randn(rows, dim).to(dtype), routed(rows, count, top_k)
        y, _ = experts(x, gate_up, down, chosen, weight)
        steps = steps_of(rows, count, top_k, packed=True)
        sizes = up_size, down_size
        check_experts(y, x, exact_up, exact_down, chosen, weight, sizes, steps)


@BUILD
@DTYPE
@pytest.mark.parametrize("rows", [3, 16, 70], ids="rows {}".format)
def test_all_rows_may_choose_one_expert(rows, dtype, build, poison_outputs):
    """Also twice. An expert with many pairs is computed in groups."""
    gate_up, exact_up, _ = expert_weight(6 * 80, 48, None, dtype)
    down, exact_down, _ = expert_weight(6 * 48, 40, None, dtype)
    x, weight = torch.randn(rows, 48).to(dtype), torch.rand(rows, 3)
    for chosen in (torch.full((rows, 3), 4), torch.tensor([5, 0, 5]).expand(rows, 3)):
        y, _ = experts(x, gate_up, down, chosen.int(), weight)
        steps = steps_of(rows, 6, 3)
        check_experts(y, x, exact_up, exact_down, chosen, weight, steps=steps)


def swapped(w, parts):
    return w.unflatten(0, (parts, 2, -1)).flip(1).reshape(w.shape)


@pytest.mark.parametrize("mistake", [None, "gate and up", "expert", "weights", "order of weights"])
def test_mistakes_of_experts_are_found(mistake):
    gate_up, exact_up, _ = expert_weight(6 * 80, 48, None, torch.bfloat16)
    down, exact_down, _ = expert_weight(6 * 48, 40, None, torch.bfloat16)
    x, (chosen, weight) = torch.randn(4, 48).bfloat16(), routed(4, 6, 3)
    given = [x, Weight(gate_up), Weight(down), chosen, weight]
    if mistake == "gate and up":
        given[1] = Weight(swapped(gate_up, 6))
    elif mistake == "expert":
        given[3] = (chosen + 1) % 6
    elif mistake == "weights":
        given[4] = torch.full_like(weight, 1 / 3)
    elif mistake == "order of weights":
        given[4] = weight.flip(1)
    y = experts_reference(*given)
    if mistake is None:
        check_experts(y, x, exact_up, exact_down, chosen, weight)
        return
    with pytest.raises(AssertionError, match="times its bound"):
        check_experts(y, x, exact_up, exact_down, chosen, weight)


@BUILD
@DTYPE
@pytest.mark.parametrize(
    "packings", [(None, None), (INT8, WITH_MINIMUM[0])], ids=["16 bits", "packed"]
)
def test_results_do_not_depend_on_the_number_of_threads(packings, dtype, build):
    """Several chunks, the last of which is not full."""
    gate_up = expert_weight(6 * 2 * 320, 640, packings[0], dtype)[0]
    down = expert_weight(6 * 640, 320, packings[1], dtype)[0]
    for rows in (1, 5, 16):
        router = router_inputs(rows, 640, 96, 64, dtype)
        x, (chosen, weight), found = torch.randn(rows, 640).to(dtype), routed(rows, 6, 4), []
        for number in (1, 2, 3):
            with threads(number):
                y, _ = experts(x, gate_up, down, chosen, weight)
                results = y, *norm_router(*router, top_k=8)
                found.append(torch.cat([part.float() for part in results], dim=-1))
        assert same_bits(*found)


@DTYPE
def test_router_and_sums_of_prompts_do_not_depend_on_the_number_of_threads(dtype, build):
    found = []
    h, scale, proj, per_expert_scale = (
        router_inputs(70, 640, 8, 64, dtype)[i] for i in (0, 6, 7, 8)
    )
    given = h, scale.float(), scale, proj, per_expert_scale
    for number in (1, 2, 3):
        with threads(number):
            results = cpu.route(*given, top_k=8, eps=EPS, offset=0.0)
            found.append(torch.cat([part.float() for part in results], dim=-1))
    assert same_bits(*found)


@DTYPE
def test_layouts_and_unaligned_tensors(dtype, build, poison_outputs):
    gate_up, exact_up, _ = expert_weight(6 * 80, 48, None, dtype)
    down, exact_down, _ = expert_weight(6 * 48, 40, None, dtype)
    for shape in ((2, 3), (7, 10)):
        rows = shape[0] * shape[1]
        chosen, weight = routed(rows, 6, 3)
        steps = steps_of(rows, 6, 3)
        for x in (
            strided((*shape, 48), dtype, "cpu"),
            unaligned(torch.randn(*shape, 48).to(dtype)),
        ):
            wide = torch.cat((weight, weight), -1).view(*shape, 6)[..., :3]
            y, _ = experts(x, unaligned(gate_up), unaligned(down), chosen.view(*shape, 3), wide)
            assert y.shape == x.shape
            flat = x.reshape(rows, 48)
            check_experts(y.flatten(0, 1), flat, exact_up, exact_down, chosen, weight, steps=steps)
        given = router_inputs(rows, 48, 40, 6, dtype)
        expected = norm_router(*given, top_k=3, eps=EPS)
        x, residual, *rest = given
        views = [z.view(*shape, -1) for z in (torch.stack((x, x), 1)[:, 0], unaligned(residual))]
        found = norm_router(*views, *map(unaligned, rest[:-1]), rest[-1], top_k=3, eps=EPS)
        assert all(map(torch.equal, (y.flatten(0, 1) for y in found), expected))


@pytest.mark.parametrize("packing", [None, INT4], ids=["not packed", "int4"])
def test_the_dense_branch_is_a_linear(packing, build):
    gate_up, exact_up, _ = expert_weight(6 * 80, 48, None, torch.float32)
    down, exact_down, _ = expert_weight(6 * 48, 40, None, torch.float32)
    dense_down, exact, size = expert_weight(48, 96, packing, torch.float32)
    x, dense, (chosen, weight) = torch.randn(5, 48), torch.randn(5, 96), routed(5, 6, 3)
    y, dense_y = experts(x, gate_up, down, chosen, weight, dense, dense_down)
    check_linear(dense_y, dense, exact, size)
    check_experts(y, x, exact_up, exact_down, chosen, weight)


def test_rows_may_be_empty(build):
    given = router_inputs(0, 48, 40, 6, torch.float32)
    h, dense, x, chosen, weight = norm_router(*given, top_k=3)
    assert (h.shape, dense.shape, chosen.shape) == ((0, 48), (0, 40), (0, 3))
    y, _ = experts(x, torch.randn(6 * 80, 48), torch.randn(6 * 48, 40), chosen, weight)
    assert y.shape == (0, 48)


@pytest.mark.parametrize("rows", [1, 16], ids="rows {}".format)
def test_repeated_calls_choose_experts_anew(rows, build):
    given = router_inputs(rows, 64, 96, 6, torch.float32)
    gate_up, down = (
        weight_of(6 * 80, 64, torch.float32, "cpu"),
        weight_of(6 * 64, 40, torch.float32, "cpu"),
    )
    dense_down, replay, seen, runs = weight_of(64, 96, torch.float32, "cpu"), Replay(), set(), []

    def function(x):
        runs.append(x)
        _, dense, x, chosen, weight = norm_router(x, *given[1:], top_k=3)
        return *experts(x, gate_up, down, chosen, weight, dense, dense_down), chosen

    for step in range(5):
        x = torch.randn(rows, 64)
        found, expected = replay(function, x), function(x)
        assert len(runs) == 2 + step, "the calls were not repeated"
        assert all(map(torch.equal, found, expected))
        seen.add(str(expected[2].tolist()))
    assert len(seen) > 1
