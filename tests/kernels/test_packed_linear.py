"""Compares packed_linear with fp64: its kernel, and its reference, which runs on a CPU."""

import pytest
import torch
from kernel_checks import DTYPES, HOPPERS, strided
from marks import slow
from oracles import root_sum_square
from packed_weights import PACKINGS, exact, packed_weight, random_rows
from tolerances import assert_rounded

from gemma_fast.kernels.embed import embed
from gemma_fast.kernels.launch import as_on, override
from gemma_fast.kernels.matvec import linear
from gemma_fast.kernels.packed import PackedWeight, Packing
from gemma_fast.kernels.packed_linear import fitting_block, packed_linear

INT4 = PACKINGS["int4, group 32"]
# (rows of x, out, dim): whole tiles; one row and column past a tile; less than a tile
SHAPES = [(16, 64, 192), (33, 65, 96), (129, 130, 96), (9, 1, 32)]


def check(y, x, weight):
    """Asserts y = x @ weightᵀ. The weight may be rounded to x.dtype."""
    assert y.dtype == x.dtype and y.is_contiguous()
    roundings = x.shape[-1] + 3  # the sum, and a scale, a minimum and its sum
    assert_rounded(
        y, x.double() @ weight.T, roundings, root_sum_square(x, weight), steps=1
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_every_packing_equals_fp64(packing, dtype, device, poison_outputs):
    weight, elements = packed_weight(33, 192, packing, device)
    x = torch.randn(17, 192, device=device).to(dtype)
    check(packed_linear(x, weight.weight), x, elements)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_and_columns_past_a_tile_equal_fp64(shape, bits, device, poison_outputs):
    rows, out, dim = shape
    weight, elements = packed_weight(out, dim, Packing(bits, 32, True, torch.float16), device)
    x = torch.randn(rows, dim, device=device)
    check(packed_linear(x, weight.weight), x, elements)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dim", [48 * 2, 640, *slow(1152)], ids="dim {}".format)
def test_one_scale_for_each_row_equals_fp64(dim, bits, device):
    weight, elements = packed_weight(20, dim, Packing(bits, dim, False, torch.float16), device)
    x = torch.randn(12, dim, device=device)
    check(packed_linear(x, weight.weight), x, elements)


def test_more_tiles_than_share_weights_equal_fp64(device, poison_outputs):
    """The last group of tiles of rows is smaller than GROUP_M."""
    weight, elements = packed_weight(40, 32, INT4, device)
    x = torch.randn(80, 32, device=device)
    with override("packed_linear", BLOCK_M=16, BLOCK_N=16, GROUP_M=2):
        check(packed_linear(x, weight.weight), x, elements)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("gpu", HOPPERS.values(), ids=HOPPERS)
def test_blocks_of_hopper_equal_fp64(gpu, bits, device):
    weight, elements = packed_weight(130, 128, Packing(bits, 32, True, torch.float16), device)
    x = torch.randn(140, 128, device=device).to(torch.float16)
    with as_on(gpu):
        check(packed_linear(x, weight.weight), x, elements)


def test_strided_and_unaligned_rows_equal_fp64(device):
    weight, elements = packed_weight(24, 64, INT4, device)
    for x in (
        strided((3, 5, 64), torch.float16, device),
        strided((5, 4, 64), torch.float16, device).transpose(0, 1),
        torch.randn(1 + 12 * 64, device=device).half()[1:].view(12, 64),
    ):
        check(packed_linear(x, weight.weight), x, elements)


def test_linear_with_many_rows_runs_packed_linear(device):
    weight, elements = packed_weight(24, 64, INT4, device)
    x = torch.randn(2, 7, 64, device=device)
    check(linear(x, weight), x, elements)


def test_no_rows_give_an_empty_result(device):
    weight, _ = packed_weight(24, 64, INT4, device)
    assert packed_linear(torch.randn(2, 0, 64, device=device), weight.weight).shape == (2, 0, 24)


# Each function changes the rows of a weight with a minimum by one mistake.
MISTAKES = {
    "halves swapped": lambda rows: rows._replace(
        values=rows.values.unflatten(1, (-1, 2, 16)).flip(2).reshape(rows.values.shape)
    ),
    "another group's scale": lambda rows: rows._replace(scale=rows.scale.roll(1, dims=1)),
    "another row's scale": lambda rows: rows._replace(scale=rows.scale.roll(1, dims=0)),
    "another group's minimum": lambda rows: rows._replace(minimum=rows.minimum.roll(1, dims=1)),
    "no minimum": lambda rows: rows._replace(minimum=0 * rows.minimum),
    "values minus 8": lambda rows: rows._replace(values=rows.values - 8),
    "columns shifted": lambda rows: rows._replace(values=rows.values.roll(1, dims=1)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_check_detects_a_mistake(mistake):
    rows = random_rows(33, 96, PACKINGS["int4, group 32, minimum"])
    x = torch.randn(9, 96).half()
    check((x.double() @ exact(rows).T).half(), x, exact(rows))
    with pytest.raises(AssertionError, match="times its bound"):
        check((x.double() @ exact(MISTAKES[mistake](rows)).T).half(), x, exact(rows))


def test_blocks_divide_the_row_and_hold_whole_groups_or_a_part_of_one():
    for bits, group, dim, expected in (
        (8, 16, 48, 16), (8, 16, 2304, 256), (8, 640, 640, 128), (8, 48, 192, 16),
        (4, 96, 192, 32), (4, 32, 640, 128), (4, 128, 2048, 256), (4, 32, 32, 32),
    ):  # fmt: skip
        weight = PackedWeight((64, dim), Packing(bits, group, False, torch.float16)).weight
        assert fitting_block(weight, 256) == expected


def test_compiled_models_run_ops_with_packed_weights(device):
    """torch.compile passes the parts of a PackedWeight to the ops."""
    table, _ = packed_weight(11, 64, PACKINGS["int4, group 32, minimum"], device)
    weight, _ = packed_weight(24, 64, INT4, device)

    def model(ids):
        return linear(embed(ids, table, 8.0, dtype=torch.float32), weight)

    ids = torch.arange(10, device=device).view(1, 10)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    assert torch.equal(compiled(ids), model(ids))
