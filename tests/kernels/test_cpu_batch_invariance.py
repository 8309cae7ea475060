"""Tests that from two rows on, C computes the same bits for a row, whatever the other rows are.

One row alone has its own kernel, whose sums have another order.
"""

from functools import partial

import pytest
import torch
from c_kernels import BUILDS, built_for, needs_c
from cpu_tensors import DTYPES, same_bits
from matvec_checks import packed_weight_of, weight_of
from mixture_checks import expert_weight, routed, router_inputs

from gemma_fast.kernels.cpu import calls
from gemma_fast.kernels.experts import experts
from gemma_fast.kernels.matvec import linear, norm_linear
from gemma_fast.kernels.packed import Packing
from gemma_fast.kernels.router import norm_router

pytestmark = needs_c
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ROWS = 16
# One block of columns, more, with a rest, less than a vector.
DIMS = [640, 1056, 2053, 7]
PACKINGS = {
    "int8": Packing(8, 32, False, torch.half), "int8, minimum": Packing(8, 16, True, torch.half),
    "int4": Packing(4, 32, False, torch.half), "int4, minimum": Packing(4, 32, True, torch.half),
    "int4, groups of 96": Packing(4, 96, False, torch.float32),
    "int8, one group": Packing(8, 1152, True, torch.bfloat16),
}  # fmt: skip
# gate_up and down of experts
PAIRS = {
    "not packed": (None, None), "int8, int4": (PACKINGS["int8"], PACKINGS["int4"]),
    "minimum": (PACKINGS["int4, minimum"], PACKINGS["int8, minimum"]),
}  # fmt: skip


@pytest.fixture(params=BUILDS)
def build(request):
    with built_for(request.param):
        yield


def assert_invariant(function, *inputs, bad=("nan", "inf")):
    """function: tensors :: [ROWS, …] → results :: [ROWS, …]. Compares the bits of each row with
    those in smaller batches, with other neighbors, of which some are NaN or inf."""
    expected = function(*inputs)
    for size in range(2, ROWS + 1):
        rows, spoilt = torch.randperm(ROWS)[:size], torch.rand(size) < 0.3
        batch = [x[rows] for x in inputs]
        batch[0][spoilt] = float(bad[size % 2])
        for y, of_all in zip(function(*batch), expected, strict=True):
            assert same_bits(y[~spoilt], of_all[rows][~spoilt]), f"{rows=} {spoilt=}"


def check_matmuls(weight, dim, dtype):
    """weight :: [38, dim]: linear, and norm_linear with all its steps."""
    norms, (x, residual) = torch.randn(2, dim), torch.randn(2, ROWS, dim).to(dtype)
    assert_invariant(lambda x: [linear(x, weight)], x)
    for geglu in (False, True):
        function = partial(norm_linear, geglu=geglu)
        assert_invariant(lambda *xs, f=function: f(*xs, *norms, weight), x, residual)


@DTYPE
@pytest.mark.parametrize("dim", DIMS, ids="dim {}".format)
def test_a_matmul_of_a_row_does_not_depend_on_other_rows(dim, dtype, build):
    check_matmuls(weight_of(38, dim, dtype, "cpu"), dim, dtype)


@DTYPE
@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_a_packed_matmul_of_a_row_does_not_depend_on_other_rows(packing, dtype, build):
    dim = 1152 if packing.group in (96, 1152) else 1056
    check_matmuls(packed_weight_of(38, dim, packing, "cpu")[0], dim, dtype)


@DTYPE
def test_a_row_has_the_same_bits_at_the_largest_number_of_rows(dtype, build):
    weight = packed_weight_of(13, 640, PACKINGS["int4"], "cpu")[0].weight
    most = max(rows for rows in range(2, 300) if calls.is_matvec(torch.empty(rows, 640), weight))
    x = torch.randn(most, 640).to(dtype)
    y, _ = calls.matvec(x, weight)
    for first in range(0, most - 1, 2):
        assert same_bits(calls.matvec(x[first : first + 2], weight)[0], y[first : first + 2])


@DTYPE
@pytest.mark.parametrize("packings", PAIRS.values(), ids=PAIRS)
def test_experts_of_a_row_do_not_depend_on_other_rows(packings, dtype, build):
    """The number of rows that choose an expert varies from 0 to most of them."""
    count, dim, width = 5, 1056, 96
    gate_up = expert_weight(count * 2 * width, dim, packings[0], dtype)[0]
    down = expert_weight(count * dim, width, packings[1], dtype)[0]
    x, (chosen, weight) = torch.randn(ROWS, dim).to(dtype), routed(ROWS, count, 2)
    assert_invariant(lambda *xs: experts(xs[0], gate_up, down, *xs[1:])[:1], x, chosen, weight)


@DTYPE
def test_the_router_of_a_row_does_not_depend_on_other_rows(dtype, build):
    x, residual, *others = router_inputs(ROWS, 1056, 32, 21, dtype)
    assert_invariant(lambda *xs: norm_router(*xs, *others, top_k=3), x, residual, bad=(1, -9))
