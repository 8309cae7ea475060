"""Compares experts with fp64."""

import pytest
import torch
from kernel_checks import DTYPES, strided
from marks import slow
from matvec_checks import check_linear, packed_weight_of, weight_of
from oracles import geglu_oracle, root_sum_square
from tolerances import GEGLU_ROUNDINGS, assert_rounded, geglu_size

from gemma_fast.kernels._skinny import MAX_ROWS
from gemma_fast.kernels.experts import experts
from gemma_fast.kernels.launch import runs_triton
from gemma_fast.kernels.packed import Packing

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
NOT_PACKED = (None, None, None)
# Packings of gate_up_proj, down_proj and dense_down_proj. Group 0 is a whole row.
KINDS = {
    "int4, group 32": (Packing(4, 32, False, HALF),) * 3,
    "int4 and int8, minimum": (Packing(4, 32, True, HALF), *(Packing(8, 16, True, HALF),) * 2),
    "int8 and int4, row": (Packing(8, 0, False, FP32), Packing(4, 0, True, BF16), None),
    "int8, int4 and int4, group 96": (
        Packing(8, 96, False, BF16),
        *(Packing(4, 96, True, FP32),) * 2,
    ),
    "int4, group 32, and no packing": (
        Packing(4, 32, True, FP32),
        None,
        Packing(8, 32, False, HALF),
    ),
}
# (dim, width, dense columns, experts, top k). Blocks of the down projections' columns hold a part
# of a slot's width, or parts of two slots.
SHAPES = [(48, 40, 24, 6, 3), (600, 17, 1160, 3, 1), (40, 32, 72, 4, 4)]


def weights(dim, width, ffn, count, dtype, device, kinds=NOT_PACKED):
    """Returns for gate_up_proj, down_proj and dense_down_proj: the weight, its values in fp64, and
    their size."""
    found = []
    for kind, (out, columns) in zip(
        kinds, ((count * 2 * width, dim), (count * dim, width), (dim, ffn)), strict=True
    ):
        if kind is None:
            weight = weight_of(out, columns, dtype, device)
            found.append((weight, weight.double(), weight.double()))
        else:
            packing = kind._replace(group=kind.group or columns)
            found.append(packed_weight_of(out, columns, packing, device))
    return found


def choose(rows, count, top_k, pattern="different"):
    """Returns chosen :: [rows, top_k]. `same`: all rows have the same experts. `all different`: no
    expert is chosen twice. The last expert is chosen at least once."""
    if pattern == "all different":
        chosen = torch.randperm(count)[: rows * top_k].view(rows, top_k)
    else:
        chosen = torch.stack([torch.randperm(count)[:top_k] for _ in range(rows)])
    if pattern == "same":
        chosen = chosen[:1].expand(rows, top_k).clone()
    if not (chosen == count - 1).any():
        chosen[:: 1 if pattern == "same" else rows, -1] = count - 1
    return chosen.int()


def inputs(rows, shape, dtype, device, kinds=NOT_PACKED, pattern="different"):
    """Returns x, chosen, weight, dense, and `weights`."""
    dim, width, ffn, count, top_k = shape
    x, dense = torch.randn(rows, dim, device=device), torch.randn(rows, ffn, device=device)
    chosen = choose(rows, count, top_k, pattern).to(device)
    weight = torch.rand(rows, top_k, device=device) + 0.1
    return (
        x.to(dtype), chosen, weight, dense.to(dtype),
        weights(dim, width, ffn, count, dtype, device, kinds),
    )  # fmt: skip


def run(x, chosen, weight, dense, parts):
    (gate_up, *_), (down, *_), (dense_down, *_) = parts
    return experts(x, gate_up, down, chosen, weight, dense, dense_down)


def check_experts(y, x, chosen, weight, gate_up, down):
    """gate_up, down: a weight, its values in fp64, and their size."""
    assert y.dtype == x.dtype
    dim, width = x.shape[1], down[1].shape[1]
    exact, size = (torch.zeros(len(x), dim, dtype=torch.float64, device=x.device) for _ in "yz")
    rows_of = lambda part, index, rows: part[index * rows : (index + 1) * rows]  # noqa: E731
    for row, slot in ((i, j) for i in range(len(x)) for j in range(chosen.shape[1])):
        index, factor, one = int(chosen[row, slot]), weight[row, slot].double(), x[row : row + 1]
        values, sizes = (rows_of(z, index, 2 * width) for z in gate_up[1:])
        projected = one.double() @ values.T
        hidden = geglu_oracle(projected)
        hidden_size = geglu_size(projected, root_sum_square(one, sizes))
        values, sizes = (rows_of(z, index, dim) for z in down[1:])
        exact[row] += factor * (hidden @ values.T)[0]
        size[row] += factor**2 * root_sum_square(hidden_size, sizes)[0].square()
    # The result of GeGLU is rounded to the dtype.
    roundings = dim + GEGLU_ROUNDINGS + width * chosen.shape[1] + 2
    assert_rounded(y, exact, roundings, size.sqrt(), 1)


def check(found, x, chosen, weight, dense, parts):
    y, dense_y = found
    gate_up, down, (dense_down, exact, size) = parts
    check_experts(y, x, chosen, weight, gate_up, down)
    rounds = not isinstance(dense_down, torch.Tensor) and (len(x) > 1 or not runs_triton(x))
    check_linear(dense_y, dense, exact, size, int(rounds))


@DTYPE
@pytest.mark.parametrize("rows", [1, 2, 5, MAX_ROWS, *slow(MAX_ROWS + 3)], ids="rows {}".format)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_experts_equal_fp64(shape, rows, dtype, device, poison_outputs):
    given = inputs(rows, shape, dtype, device)
    check(run(*given), *given)


@DTYPE
def test_experts_of_the_width_of_gemma_4_equal_fp64(dtype, device, poison_outputs):
    given = inputs(1, (24, 704, 24, 3, 3), dtype, device)
    check(run(*given), *given)


@DTYPE
@pytest.mark.parametrize("width", [1, 3])
def test_narrow_experts_equal_fp64(width, dtype, device, poison_outputs):
    """A row of the down projection is shorter than a thread's load of 16 bytes."""
    given = inputs(1, (24, width, 24, 3, 2), dtype, device)
    check(run(*given), *given)


@pytest.mark.parametrize("rows", [1, 2, *slow(MAX_ROWS)], ids="rows {}".format)
@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("shape", [(192, 96, 192, 5, 3), (96, 192, 96, 3, 2)], ids=str)
def test_packed_experts_equal_fp64(shape, kinds, rows, device, poison_outputs):
    given = inputs(rows, shape, torch.float32, device, KINDS[kinds])
    check(run(*given), *given)


@pytest.mark.parametrize("pattern", ["same", "different", "all different"])
@pytest.mark.parametrize("rows", [2, 5, MAX_ROWS], ids="rows {}".format)
def test_rows_may_share_experts(rows, pattern, device, poison_outputs):
    given = inputs(rows, (32, 24, 24, 26, 3), torch.float32, device, pattern=pattern)
    check(run(*given), *given)


@pytest.mark.parametrize("rows", [1, 3], ids="rows {}".format)
@pytest.mark.parametrize("kinds", [NOT_PACKED, *KINDS.values()], ids=str)
def test_experts_that_are_not_chosen_are_not_read(rows, kinds, device):
    """The others hold NaN, except for packed integers, whose scales hold NaN."""
    given = inputs(rows, (96, 96, 96, 7, 2), torch.float32, device, kinds)
    _, chosen, _, _, parts = given
    others = [i for i in range(7) if i not in chosen.tolist()[0] + chosen.flatten().tolist()]
    assert others
    expected = run(*given)
    for part, *_ in parts[:2]:
        data = part if isinstance(part, torch.Tensor) else part.scale
        data.view(7, -1)[others] = float("nan")
    for once, again in zip(expected, run(*given), strict=True):
        assert torch.equal(once, again)


MISTAKES = [
    "gate and up swapped", "next expert", "weights of another slot", "weights rounded",
    "weights left out", "a slot left out", "erf", "down of the next expert",
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("rows", [1, 4], ids="rows {}".format)
def test_check_detects_a_mistake(mistake, rows, device):
    given = inputs(rows, (64, 40, 24, 6, 3), torch.float32, device)
    x, chosen, weight, dense, parts = given
    check(run(*given), *given)
    (gate_up, *_), (down, *_), third = parts
    if mistake == "gate and up swapped":
        gate_up = gate_up.view(6, 2, 40, 64).flip(1).reshape(gate_up.shape)
    elif mistake == "next expert":
        chosen = (chosen + 1) % 6
    elif mistake == "weights of another slot":
        weight = weight.roll(1, 1)
    elif mistake == "weights rounded":
        weight = weight.half().float()
    elif mistake == "weights left out":
        weight = torch.ones_like(weight)
    elif mistake == "a slot left out":
        chosen, weight = chosen[:, :2].contiguous(), weight[:, :2].contiguous()
    elif mistake == "down of the next expert":
        down = down.roll(64, 0)
    else:  # GELU by erf: gate changes by up to 5e-4
        gate_up = gate_up * 1.0001
    found = run(x, chosen, weight, dense, ((gate_up,), (down,), third))
    with pytest.raises(AssertionError, match="times its bound"):
        check(found, *given)


@pytest.mark.parametrize("rows", [1, 5], ids="rows {}".format)
def test_without_a_dense_mlp(rows, device, poison_outputs):
    x, chosen, weight, dense, parts = inputs(rows, (64, 40, 24, 6, 3), torch.float32, device)
    y, dense_y = experts(x, parts[0][0], parts[1][0], chosen, weight)
    assert dense_y.shape == (0,)
    check_experts(y, x, chosen, weight, *parts[:2])
    assert torch.equal(y, run(x, chosen, weight, dense, parts)[0])


@pytest.mark.parametrize("rows", [1, 3], ids="rows {}".format)
def test_the_same_inputs_give_the_same_bits(rows, device):
    given = inputs(rows, (1100, 16, 24, 6, 3), torch.float32, device)
    for once, again in zip(run(*given), run(*given), strict=True):
        assert torch.equal(once, again)


def test_batched_strided_rows_equal_fp64(device, poison_outputs):
    parts = weights(64, 40, 24, 6, torch.float32, device)
    for shape in ((2, 3), (1, 1), (0, 2)):
        x, dense = (strided((*shape, n), torch.float32, device) for n in (64, 24))
        chosen = torch.randint(0, 6, (*shape, 5), device=device, dtype=torch.int32)[..., 1:4]
        weight = torch.rand(*shape, 5, device=device)[..., 1:4]
        found = run(x, chosen, weight, dense, parts)
        assert [y.shape for y in found] == [x.shape, x.shape]
        if x.numel():
            flat = [z.flatten(0, 1) for z in (*found, x, chosen, weight, dense)]
            check(flat[:2], *flat[2:], parts)


@pytest.mark.parametrize("rows", [1, 3], ids="rows {}".format)
def test_a_row_may_choose_an_expert_twice(rows, device, poison_outputs):
    x, chosen, weight, dense, parts = inputs(rows, (64, 40, 24, 6, 3), torch.float32, device)
    chosen[:] = torch.tensor([4, 2, 4], dtype=torch.int32, device=device)
    check(run(x, chosen, weight, dense, parts), x, chosen, weight, dense, parts)


def test_nan_in_a_row_stays_in_it(device):
    given = inputs(3, (64, 40, 24, 6, 3), torch.float32, device)
    x, _, weight, *_ = given
    expected = run(*given)
    x[1, 7], weight[2, 0] = float("nan"), float("nan")
    y, dense_y = run(*given)
    assert y[1:].isnan().all() and torch.equal(y[0], expected[0][0])
    assert torch.equal(dense_y, expected[1])


def test_wrong_shapes_raise(device):
    x, chosen, weight, dense, parts = inputs(2, (64, 40, 24, 6, 3), torch.float32, device)
    (gate_up, *_), (down, *_), (dense_down, *_) = parts
    for wrong in (
        (x, gate_up[:-80], down, chosen, weight, dense, dense_down),
        (x, gate_up, down[:, 1:], chosen, weight, dense, dense_down),
        (x, gate_up, down, chosen.long(), weight, dense, dense_down),
        (x, gate_up, down, chosen, weight[:, :2], dense, dense_down),
        (x, gate_up, down, chosen, weight, dense, None),
        (x, gate_up, down, chosen, weight, dense[:1], dense_down),
        (x, gate_up, down, chosen, weight, dense, dense_down[:, 1:]),
        (x.half(), gate_up, down, chosen, weight),
    ):
        with pytest.raises(AssertionError):
            experts(*wrong)
