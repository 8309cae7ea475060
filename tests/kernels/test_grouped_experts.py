"""Compares grouped_experts, the kernels for experts of prompts, with fp64."""

from typing import NamedTuple

import pytest
import torch
from kernel_checks import DTYPES, HOPPERS, strided
from oracles import geglu_oracle
from packed_weights import PACKINGS, packed_weight
from tolerances import GEGLU_ROUNDINGS, assert_rounded, geglu_size
from torch import Tensor
from triton_interpreter import interpreter

from gemma_fast.kernels._expert_tiles import sort_pairs
from gemma_fast.kernels.experts import experts
from gemma_fast.kernels.grouped_experts import grouped_experts
from gemma_fast.kernels.launch import as_on, override
from gemma_fast.kernels.packed import Packing, Weight

BLOCKS = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16}


@pytest.fixture
def device():
    """Returns the device for the inputs: a GPU, or the CPU, where the interpreter runs kernels."""
    with interpreter():
        yield "cuda" if torch.cuda.is_available() else "cpu"


class Experts(NamedTuple):
    """Weights as the op gets them, and in fp64."""

    gate_up: Weight
    down: Weight
    exact_gate_up: Tensor  # [experts, 2 * width, dim]
    exact_down: Tensor  # [experts, dim, width]


def plain(out: int, dim: int, dtype: torch.dtype, device: str) -> tuple[Weight, Tensor]:
    weight = (torch.randn(out, dim, device=device) / dim**0.5).to(dtype)
    return Weight(weight), weight.double()


def packed(out: int, dim: int, packing: Packing, device: str) -> tuple[Weight, Tensor]:
    weight, exact = packed_weight(out, dim, packing, device)
    return weight.weight, exact


def random_experts(count, dim, width, kinds, device) -> Experts:
    """Returns random experts. kinds: dtype or packing of gate_up and of down."""
    shapes = (count * 2 * width, dim), (count * dim, width)
    (gate_up, exact_gate_up), (down, exact_down) = (
        (packed if isinstance(kind, Packing) else plain)(*shape, kind, device)
        for shape, kind in zip(shapes, kinds, strict=True)
    )
    return Experts(
        gate_up, down, exact_gate_up.view(count, 2 * width, dim),
        exact_down.view(count, dim, width),
    )  # fmt: skip


def routed(rows: int, count: int, top_k: int, device: str) -> tuple[Tensor, Tensor]:
    """Returns `chosen`, different experts for each row, and their weights."""
    chosen = torch.rand(rows, count, device=device).argsort(dim=1)[:, :top_k]
    return chosen.int().contiguous(), 0.1 + torch.rand(rows, top_k, device=device)


def oracle(x, experts, chosen, weight):
    """Returns the result in fp64, [rows, dim], and the size of the numbers in its sums."""
    gate_up, down = experts.exact_gate_up[chosen.long()], experts.exact_down[chosen.long()]
    x, weight = x.double(), weight.double()
    pre = torch.einsum("rd,rkfd->rkf", x, gate_up)
    size = torch.einsum("rd,rkfd->rkf", x.square(), gate_up.square()).sqrt()
    hidden, hidden_size = geglu_oracle(pre), geglu_size(pre, size)
    y = torch.einsum("rk,rkf,rkdf->rd", weight, hidden, down)
    square = torch.einsum(
        "rk,rkf,rkdf->rd", weight.square(), hidden_size.square(), down.square()
    )  # fmt: skip
    return y, square.sqrt()


def check(y, x, experts, chosen, weight):
    """Asserts that y is the result except for rounding errors. hidden and terms are rounded to
    x.dtype, and so are packed weights."""
    assert y.dtype == x.dtype and y.shape == x.shape and y.is_contiguous()
    (dim, width), top_k = experts.exact_down.shape[1:], chosen.shape[-1]
    x, chosen, weight = (z.reshape(-1, z.shape[-1]) for z in (x, chosen, weight))
    steps = 2 + sum(w.scale is not None for w in (experts.gate_up, experts.down))
    roundings = GEGLU_ROUNDINGS + dim + width + 2 * top_k + 6  # 6: scales and minimums
    exact, size = oracle(x, experts, chosen, weight)
    assert_rounded(y.reshape(x.shape), exact, roundings, size, steps)


def run(x, experts, chosen, weight):
    return grouped_experts(x, experts.gate_up, experts.down, chosen, weight)


# (rows, experts, top_k, dim, width)
SHAPES = [
    (9, 4, 2, 64, 32), (16, 5, 1, 72, 40), (33, 8, 3, 96, 88), (100, 6, 2, 48, 24),
    (10, 1, 1, 16, 8),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_equal_fp64(shape, dtype, device, poison_outputs):
    rows, count, top_k, dim, width = shape
    given = random_experts(count, dim, width, [dtype] * 2, device)
    x, route = torch.randn(rows, dim, device=device).to(dtype), routed(rows, count, top_k, device)
    check(run(x, given, *route), x, given, *route)


# The expert of each row, of 4 experts.
IMBALANCES = {
    "all rows to the first expert": [0] * 40,
    "all rows to the last expert": [3] * 40,
    "one row to the last expert": [1] * 39 + [3],
    "experts without rows": [2, 0] * 20,
    "one row more than a tile for each expert": [0, 1, 2, 3] * 17,
    "as many rows as a tile": [1] * 16 + [2] * 16,
}


@pytest.mark.parametrize("rows", IMBALANCES.values(), ids=IMBALANCES)
def test_any_imbalance_equals_fp64(rows, device, poison_outputs):
    given = random_experts(4, 48, 24, [torch.float32] * 2, device)
    x, chosen = torch.randn(len(rows), 48, device=device), torch.tensor(rows, device=device).int()
    # The second expert of a row, as a rule another one.
    chosen = torch.stack((chosen, (chosen * 3) % 4), dim=1)
    weight = torch.rand(chosen.shape, device=device)
    for slots in (1, 2):
        route = chosen[:, :slots], weight[:, :slots]
        with override("grouped_gate_up", **BLOCKS), override("grouped_down", **BLOCKS):
            check(run(x, given, *route), x, given, *route)


def test_more_tiles_than_share_weights_equal_fp64(device, poison_outputs):
    """The last group of tiles of rows is smaller than GROUP_M."""
    given = random_experts(2, 80, 72, [torch.float32] * 2, device)
    x, (chosen, weight) = torch.randn(90, 80, device=device), routed(90, 2, 1, device)
    blocks = BLOCKS | {"GROUP_M": 2}
    with override("grouped_gate_up", **blocks), override("grouped_down", **blocks):
        check(run(x, given, chosen * 0, weight), x, given, chosen * 0, weight)
        check(run(x, given, chosen, weight), x, given, chosen, weight)


# Two different packings, by their names.
NAMES = list(zip(PACKINGS, list(PACKINGS)[3:] + list(PACKINGS)[:3], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", NAMES, ids=" | ".join)
def test_every_packing_equals_fp64(names, dtype, device, poison_outputs):
    given = random_experts(2, 192, 192, [PACKINGS[name] for name in names], device)
    x, route = torch.randn(21, 192, device=device).to(dtype), routed(21, 2, 1, device)
    check(run(x, given, *route), x, given, *route)


@pytest.mark.parametrize("bits", [8, 4])
def test_one_scale_for_each_row_equals_fp64(bits, device, poison_outputs):
    kinds = [Packing(bits, dim, False, torch.float16) for dim in (160, 352)]
    given = random_experts(2, 160, 352, kinds, device)
    x, route = torch.randn(12, 160, device=device), routed(12, 2, 2, device)
    check(run(x, given, *route), x, given, *route)


@pytest.mark.parametrize("packed_part", [0, 1], ids=["gate_up", "down"])
def test_only_one_packed_weight_equals_fp64(packed_part, device, poison_outputs):
    kinds = [torch.float32] * 2
    kinds[packed_part] = PACKINGS["int4, group 32, minimum"]
    given = random_experts(3, 96, 64, kinds, device)
    x, route = torch.randn(12, 96, device=device), routed(12, 3, 2, device)
    check(run(x, given, *route), x, given, *route)


KINDS = {"fp16": torch.float16, "int8": Packing(8, 32, True, torch.float16)}
KINDS["int4"] = PACKINGS["int4, group 32"]


@pytest.mark.parametrize("rows", [20, 60, 150], ids="{} rows".format)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_blocks_of_hopper_equal_fp64(kind, rows, device, poison_outputs):
    """Blocks are larger for more rows per expert."""
    given = random_experts(2, 128, 96, [kind] * 2, device)
    x, route = torch.randn(rows, 128, device=device).half(), routed(rows, 2, 1, device)
    with as_on(HOPPERS["132 SMs"]):
        check(run(x, given, *route), x, given, *route)


def test_strided_and_unaligned_rows_equal_fp64(device, poison_outputs):
    given = random_experts(4, 64, 32, [torch.float16] * 2, device)
    for x in (
        strided((3, 5, 64), torch.float16, device),
        strided((5, 3, 64), torch.float16, device).transpose(0, 1),
        torch.randn(1 + 15 * 64, device=device).half()[1:].view(3, 5, 64),
    ):
        chosen, weight = (z.view(2, 3, 5).permute(1, 2, 0) for z in routed(15, 4, 2, device))
        check(run(x, given, chosen, weight), x, given, chosen, weight)


def test_no_rows_give_an_empty_result(device):
    given = random_experts(4, 64, 32, [torch.float32] * 2, device)
    x, route = torch.randn(2, 0, 64, device=device), torch.zeros(2, 0, 3, device=device)
    assert run(x, given, route.int(), route).shape == x.shape


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_second_run_gives_the_same_bits(kind, device, poison_outputs):
    given = random_experts(5, 64, 96, [kind] * 2, device)
    x, route = torch.randn(20, 64, device=device).half(), routed(20, 5, 3, device)
    assert torch.equal(run(x, given, *route), run(x, given, *route))


def test_a_row_with_nan_leaves_other_rows_as_they_are(device):
    given = random_experts(3, 64, 32, [torch.float32] * 2, device)
    x, (chosen, weight) = torch.randn(20, 64, device=device), routed(20, 3, 2, device)
    y = run(x, given, chosen, weight)
    others = [i for i in range(20) if i not in (0, 7)]
    x[0], weight[7] = float("nan"), float("nan")
    found = run(x, given, chosen, weight)
    assert found[[0, 7]].isnan().all() and torch.equal(found[others], y[others])


@pytest.mark.parametrize("pairs", [1, 9, 128, 5000])
def test_pairs_are_sorted_by_expert_and_by_number(pairs, device):
    chosen = torch.randint(1, 6, (pairs,), device=device, dtype=torch.int32)  # none to 0 and 6
    order, first = sort_pairs(chosen, 7)
    expected, index = chosen.sort(stable=True)
    assert torch.equal(order.long(), index)
    edges = torch.arange(8, device=device, dtype=torch.int32)
    assert torch.equal(first.long(), torch.searchsorted(expected, edges))


def test_experts_with_many_rows_run_grouped_experts(device):
    given = random_experts(4, 64, 32, [torch.float32] * 2, device)
    x, (chosen, weight) = torch.randn(3, 5, 64, device=device), routed(15, 4, 2, device)
    route = chosen.view(3, 5, 2), weight.view(3, 5, 2)
    y, dense = experts(x, given.gate_up.data, given.down.data, *route)
    assert torch.equal(y, run(x, given, *route)) and not dense.numel()


def in_fp64(x, given, chosen, weight):
    return oracle(x, given, chosen, weight)[0].to(x.dtype)


def without_last_row(x, given, chosen, weight):
    """Drops the last row of expert 0."""
    weight = weight.clone()
    row, slot = (chosen == 0).nonzero()[-1]
    weight[row, slot] = 0
    return in_fp64(x, given, chosen, weight)


def with_halves_swapped(x, given, chosen, weight):
    gate_up = given.exact_gate_up.chunk(2, dim=1)
    return in_fp64(x, given._replace(exact_gate_up=torch.cat(gate_up[::-1], 1)), chosen, weight)


# Each function returns the result with one mistake.
MISTAKES = {
    "another slot's weight": lambda x, given, c, w: in_fp64(x, given, c, w.roll(1, dims=1)),
    "another row's weight": lambda x, given, c, w: in_fp64(x, given, c, w.roll(1, dims=0)),
    "the next expert": lambda x, given, c, w: in_fp64(x, given, (c + 1) % 5, w),
    "another expert's down": lambda x, given, c, w: in_fp64(
        x, given._replace(exact_down=given.exact_down.roll(1, dims=0)), c, w
    ),
    "the last row of an expert dropped": without_last_row,
    "the next row of x": lambda x, given, c, w: in_fp64(x.roll(1, dims=0), given, c, w),
    "gate and up swapped": with_halves_swapped,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_check_detects_a_mistake(mistake, dtype):
    given = random_experts(5, 64, 96, [dtype] * 2, "cpu")
    x, route = torch.randn(33, 64).to(dtype), routed(33, 5, 2, "cpu")
    check(in_fp64(x, given, *route), x, given, *route)
    with pytest.raises(AssertionError, match="times its bound"):
        check(MISTAKES[mistake](x, given, *route), x, given, *route)
