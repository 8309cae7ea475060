"""Compares the experts of few rows and of prompts, computed in C, with fp64."""

import pytest
import torch
from c_kernels import BUILDS, built_for, needs_c
from cpu_tensors import DTYPES, same_bits, threads, unaligned
from kernel_checks import strided
from matvec_checks import check_linear, weight_of
from mixture_checks import check_experts, expert_weight, routed, router_inputs

from gemma_fast.kernels import experts as experts_file
from gemma_fast.kernels.cpu import calls
from gemma_fast.kernels.cpu import experts as cpu
from gemma_fast.kernels.cpu.replay import Replay
from gemma_fast.kernels.experts import experts, experts_reference
from gemma_fast.kernels.packed import Packing, Weight
from gemma_fast.kernels.router import norm_router

pytestmark = needs_c
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# (experts, top_k, dim, width): odd sizes; one expert; all of them; several chunks
SIZES = [
    (6, 3, 48, 40), (6, 1, 37, 13), (6, 6, 48, 40), (1, 1, 7, 5), (40, 1, 64, 24),
    (16, 8, 640, 352),
]  # fmt: skip
SIZE = pytest.mark.parametrize("size", SIZES, ids=str)
# 2 and more rows share experts. With 17 rows or 70, a library multiplies, if the experts are few.
ROWS = [1, 2, 3, 5, 16, 17, 70]
INT8, INT4 = Packing(8, 32, False, torch.half), Packing(4, 32, False, torch.half)
WITH_MINIMUM = Packing(4, 64, True, torch.half), Packing(8, 16, True, torch.float32)
# Packings of gate_up and down.
PACKINGS = {
    "int4": (INT4, INT4), "int8": (INT8, INT8), "int4, int8": (INT4, INT8),
    "int8, int4 with minimum": (INT8, WITH_MINIMUM[0]), "minimum": WITH_MINIMUM,
    "int4 with minimum, not packed": (WITH_MINIMUM[0], None), "not packed, int4": (None, INT4),
}  # fmt: skip


@pytest.fixture(params=BUILDS)
def build(request, monkeypatch):
    """Lets only the C kernels compute, and for prompts a library."""
    monkeypatch.setattr(experts_file, "experts_reference", None)
    with built_for(request.param):
        yield


def tiny_experts(dtype):
    """Returns gate_up and down of 6 experts, dim 48 and width 40, and their elements in fp64."""
    parts = [expert_weight(6 * rows, dim, None, dtype) for rows, dim in ((80, 48), (48, 40))]
    return [weight for weight, *_ in parts], [elements for _, elements, _ in parts]


def steps_of(rows, count, top_k, dtype, packings=(None, None)):
    """Returns how many results are rounded to x.dtype before y."""
    packed = packings[0] is not None
    few = (cpu.FEW_PACKED if packed else cpu.FEW) * count
    if rows <= calls.MAX_ROWS[dtype][packed] or rows * top_k <= few:
        return 1
    return 3 if packings == (None, None) else 5


@DTYPE
@SIZE
def test_experts_equal_fp64(size, dtype, build, poison_outputs):
    count, top_k, dim, width = size
    gate_up, exact_up, _ = expert_weight(count * 2 * width, dim, None, dtype)
    down, exact_down, _ = expert_weight(count * dim, width, None, dtype)
    for rows in ROWS:
        x, (chosen, weight) = torch.randn(rows, dim).to(dtype), routed(rows, count, top_k)
        y, dense_y = experts(x, gate_up, down, chosen, weight)
        steps = steps_of(rows, count, top_k, dtype)
        check_experts(y, x, exact_up, exact_down, chosen, weight, steps=steps)
        assert dense_y.shape == (0,)


@DTYPE
@pytest.mark.parametrize("packings", PACKINGS.values(), ids=PACKINGS)
def test_packed_experts_equal_fp64(packings, dtype, build, poison_outputs):
    """Weights of few rows are not rounded to x's dtype."""
    count, top_k, dim, width = 5, 2, 192, 64
    gate_up, exact_up, up_size = expert_weight(count * 2 * width, dim, packings[0], dtype)
    down, exact_down, down_size = expert_weight(count * dim, width, packings[1], dtype)
    for rows in ROWS:
        x, (chosen, weight) = torch.randn(rows, dim).to(dtype), routed(rows, count, top_k)
        y, _ = experts(x, gate_up, down, chosen, weight)
        steps = steps_of(rows, count, top_k, dtype, packings)
        sizes = up_size, down_size
        check_experts(y, x, exact_up, exact_down, chosen, weight, sizes, steps)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gelu_of_gate_times_up_is_rounded(dtype, build):
    """8 and 8 + 2**-9 are 8 in 16 bits, so their difference is 0."""
    gate_up = torch.tensor([[8, 0], [8, 0], [1, 0], [1, 2**-12]]).to(dtype)
    down = torch.tensor([[1, -1], [1, 0]]).to(dtype)
    for rows in (1, 5):
        given = torch.ones(rows, 2).to(dtype), gate_up, down, torch.zeros(rows, 1).int()
        assert experts(*given, torch.ones(rows, 1))[0].tolist() == [[0, 8]] * rows


@DTYPE
@pytest.mark.parametrize("rows", [3, 16, 70], ids="rows {}".format)
def test_all_rows_may_choose_one_expert(rows, dtype, build, poison_outputs):
    """Also twice. An expert with many pairs is computed in groups."""
    (gate_up, down), exact = tiny_experts(dtype)
    x, weight = torch.randn(rows, 48).to(dtype), torch.rand(rows, 3)
    for chosen in (torch.full((rows, 3), 4), torch.tensor([5, 0, 5]).expand(rows, 3)):
        y, _ = experts(x, gate_up, down, chosen.int(), weight)
        steps = steps_of(rows, 6, 3, dtype)
        check_experts(y, x, *exact, chosen, weight, steps=steps)


def swapped(w, parts):
    return w.unflatten(0, (parts, 2, -1)).flip(1).reshape(w.shape)


@pytest.mark.parametrize("mistake", [None, "gate and up", "expert", "weights", "order of weights"])
def test_mistakes_of_experts_are_found(mistake):
    (gate_up, down), exact = tiny_experts(torch.bfloat16)
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
        check_experts(y, x, *exact, chosen, weight)
        return
    with pytest.raises(AssertionError, match="times its bound"):
        check_experts(y, x, *exact, chosen, weight)


@DTYPE
@pytest.mark.parametrize(
    "packings", [(None, None), (INT8, WITH_MINIMUM[0])], ids=["16 bits", "packed"]
)
def test_results_do_not_depend_on_the_number_of_threads(packings, dtype, build):
    """Several chunks, the last of which is not full."""
    gate_up = expert_weight(6 * 2 * 320, 640, packings[0], dtype)[0]
    down = expert_weight(6 * 640, 320, packings[1], dtype)[0]
    for rows in (1, 5, 16):
        x, (chosen, weight), found = torch.randn(rows, 640).to(dtype), routed(rows, 6, 4), []
        for number in (1, 2, 3):
            with threads(number):
                found.append(experts(x, gate_up, down, chosen, weight)[0])
        assert same_bits(*found)


@DTYPE
@pytest.mark.parametrize("shape", [(2, 3), (7, 10)], ids=str)
def test_layouts(shape, dtype, build, poison_outputs):
    rows, (weights, exact) = shape[0] * shape[1], tiny_experts(dtype)
    chosen, weight = routed(rows, 6, 3)
    x, wide = strided((*shape, 48), dtype, "cpu"), torch.cat((weight, weight), 1).view(*shape, 6)
    y, _ = experts(x, *weights, chosen.view(*shape, 3), wide[..., :3])
    assert y.shape == x.shape
    y, x = y.flatten(0, 1), x.reshape(rows, 48)
    check_experts(y, x, *exact, chosen, weight, steps=steps_of(rows, 6, 3, dtype))


@DTYPE
def test_unaligned_tensors_give_the_result_of_aligned_ones(dtype, build):
    gate_up, down = (
        expert_weight(out, dim, packing, dtype)[0].weight
        for out, dim, packing in ((6 * 128, 32, INT4), (6 * 32, 64, WITH_MINIMUM[0]))
    )
    x, (chosen, weight) = torch.randn(5, 32).to(dtype), routed(5, 6, 3)
    given = x, gate_up.data, down.data, chosen, weight
    factors = {
        "gate_up_proj_scale": gate_up.scale, "down_proj_scale": down.scale,
        "down_proj_minimum": down.minimum,
    }  # fmt: skip
    expected, _ = experts(*given, **factors)
    found, _ = experts(*map(unaligned, given), **{k: unaligned(v) for k, v in factors.items()})
    assert torch.equal(found, expected)


@pytest.mark.parametrize("packing", [None, INT4], ids=["not packed", "int4"])
def test_the_dense_branch_is_a_linear(packing, build):
    weights, exact = tiny_experts(torch.float32)
    dense_down, exact_dense, size = expert_weight(48, 96, packing, torch.float32)
    x, dense, (chosen, weight) = torch.randn(5, 48), torch.randn(5, 96), routed(5, 6, 3)
    y, dense_y = experts(x, *weights, chosen, weight, dense, dense_down)
    check_linear(dense_y, dense, exact_dense, size)
    check_experts(y, x, *exact, chosen, weight)


def test_rows_may_be_empty(build):
    weights, _ = tiny_experts(torch.float32)
    y, _ = experts(torch.empty(0, 48), *weights, *routed(0, 6, 3))
    assert y.shape == (0, 48)


@pytest.mark.parametrize("index", [-1, 6, 2**31 - 1])
@pytest.mark.parametrize("rows", [1, 16, 100], ids="rows {}".format)
def test_an_expert_out_of_range_raises(rows, index, build):
    weights, _ = tiny_experts(torch.float32)
    chosen, weight = routed(rows, 6, 3)
    chosen[-1, 1] = index
    with pytest.raises(AssertionError, match=str(index)):
        experts(torch.ones(rows, 48), *weights, chosen, weight)


@pytest.mark.parametrize("rows", [1, 16], ids="rows {}".format)
def test_repeated_calls_choose_experts_anew(rows, build):
    given, (weights, _) = router_inputs(rows, 48, 96, 6, torch.float32), tiny_experts(torch.float32)
    dense_down, replay, seen, runs = weight_of(48, 96, torch.float32, "cpu"), Replay(), set(), []

    def function(x):
        runs.append(x)
        _, dense, x, chosen, weight = norm_router(x, *given[1:], top_k=3)
        return *experts(x, *weights, chosen, weight, dense, dense_down), chosen

    for step in range(5):
        x = torch.randn(rows, 48)
        found, expected = replay(function, x), function(x)
        assert len(runs) == 2 + step, "the calls were not repeated"
        assert all(map(torch.equal, found, expected))
        seen.add(str(expected[2].tolist()))
    assert len(seen) > 1
