"""Tests kernels.packed: what a PackedWeight holds, how it is copied and moved, and its errors."""

import copy
import pickle

import pytest
import torch
from packed_weights import PACKINGS, exact, packed_weight, random_rows, value_range
from torch import nn

from gemma_fast.kernels.packed import (
    PackedRows,
    PackedWeight,
    Packing,
    Weight,
    check_packing,
    common_packing,
    take_rows,
)

OUT, DIM = 9, 192
INT8, INT4 = PACKINGS["int8, group 32"], PACKINGS["int4, group 32"]
MINIMUM = PACKINGS["int4, group 32, minimum"]


def unpacked(weight):
    return weight.weight.unpack(torch.float32)


def in_fp32(rows):
    """Returns the rows in fp32: scale * value, rounded, then plus the minimum, rounded."""
    group = DIM // rows.scale.shape[1]
    scale = rows.scale.float().repeat_interleave(group, dim=1)
    if rows.minimum is None:
        return scale * rows.values.float()
    return scale * rows.values.float() + rows.minimum.float().repeat_interleave(group, dim=1)


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_rows_are_unpacked_bit_for_bit(packing):
    rows = random_rows(OUT, DIM, packing)
    weight = PackedWeight((OUT, DIM), packing)
    for part in weight.parameters():  # what is not written stays NaN or 0x77
        part.fill_(float("nan") if part.is_floating_point() else 0x77)
    for start, stop in ((0, 5), (5, 6), (6, 6), (6, OUT)):
        weight.write(start, PackedRows(*(x if x is None else x[start:stop] for x in rows)))
    assert torch.equal(weight.weight.values(), rows.values)
    assert torch.equal(unpacked(weight), in_fp32(rows))
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(weight.weight.unpack(dtype), in_fp32(rows).to(dtype))
    assert (unpacked(weight) - exact(rows)).abs().max() < 1e-6
    assert weight.shape == weight.weight.shape == (OUT, DIM) and weight.numel() == OUT * DIM
    scales = OUT * DIM // packing.group * packing.scale.itemsize * (1 + packing.minimum)
    assert weight.nbytes == OUT * DIM * packing.bits // 8 + scales


def test_4_bits_have_the_layout_that_kernels_read():
    """16 bytes have 32 columns: byte j has column j in its low half and column j + 16 above."""
    values = (torch.arange(64) % 16 - 8).to(torch.int8).unsqueeze(0)
    values[0, 16:32] = 7 - torch.arange(16)
    weight = PackedWeight((1, 64), INT4)
    weight.write(0, PackedRows(values, torch.ones(1, 2), None))
    first, second = weight.data[0].tolist()[:16], weight.data[0].tolist()[16:]
    assert first == [j | 15 - j << 4 for j in range(16)]
    assert second == [j | j << 4 for j in range(16)]


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_taken_rows_equal_unpacked_rows(packing):
    weight, _ = packed_weight(OUT, DIM, packing)
    index = torch.tensor([[3, 0], [8, 3]])
    assert torch.equal(take_rows(weight.weight, index, torch.float32), unpacked(weight)[index])
    assert torch.equal(
        weight.weight.rows(2, 5).unpack(torch.float16), weight.weight.unpack(torch.float16)[2:5]
    )
    plain = torch.randn(OUT, DIM)
    assert torch.equal(take_rows(Weight(plain), index, torch.float32), plain[index])


# (packing of the rows, packing of the weight that holds them)
PROMOTIONS = [
    (INT4, INT8),
    (INT4, MINIMUM),
    (INT4, Packing(8, 32, True, torch.float16)),
    (INT8, Packing(8, 16, True, torch.float32)),
    (MINIMUM, Packing(8, 32, True, torch.float32)),
    (Packing(4, DIM, False, torch.bfloat16), Packing(4, 32, False, torch.float32)),
    (Packing(8, 96, False, torch.float16), Packing(8, 48, True, torch.float16)),
]


@pytest.mark.parametrize(("stored", "packing"), PROMOTIONS, ids=str)
def test_a_weight_holds_rows_of_smaller_packings_exactly(stored, packing):
    rows = random_rows(OUT, DIM, stored)
    weight = PackedWeight((OUT, DIM), packing)
    weight.write(0, rows)
    assert torch.equal(unpacked(weight).double(), exact(rows))
    assert common_packing([stored, packing]) == packing


def test_the_common_packing_holds_every_part():
    assert common_packing([INT4]) == INT4
    parts = [INT4, Packing(8, 48, True, torch.bfloat16), Packing(4, DIM, False, torch.float16)]
    packing = common_packing(parts)
    assert packing == Packing(8, 16, True, torch.float32)
    for part in parts:
        weight, rows = PackedWeight((OUT, DIM), packing), random_rows(OUT, DIM, part)
        weight.write(0, rows)
        assert (unpacked(weight) - exact(rows)).abs().max() < 1e-7


def test_groups_that_4_bits_cannot_have_are_held_in_8_bits():
    fused = common_packing([Packing(4, 32, False, torch.float16), Packing(4, 48, *INT4[2:])])
    assert fused == Packing(8, 16, False, torch.float16)


@pytest.mark.parametrize(
    ("packing", "message"),
    [
        (Packing(2, 32, False, torch.float16), "2 bits are not supported, only 8 and 4"),
        (Packing(4, 16, False, torch.float16), "groups of 16 columns .* 192 .* multiple of 32"),
        (Packing(8, 8, False, torch.float16), "groups of 8 columns .* multiple of 16"),
        (Packing(8, 128, False, torch.float16), "groups of 128 columns must divide .* 192"),
        (Packing(8, 0, False, torch.float16), "groups of 0 columns"),
        (Packing(8, 32, False, torch.float64), "float64 are not supported"),
    ],
    ids=str,
)
def test_a_packing_that_does_not_fit_raises(packing, message):
    with pytest.raises(ValueError, match=message):
        check_packing(DIM, packing)
    with pytest.raises(ValueError, match=message):
        PackedWeight((OUT, DIM), packing)


@pytest.mark.parametrize("factor", [1e6, float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("part", ["scale", "minimum"])
def test_a_scale_that_does_not_fit_its_dtype_raises(part, factor):
    rows = random_rows(OUT, DIM, MINIMUM)
    wrong = getattr(rows, part).float()
    wrong[4, 2] = factor
    rows, weight = rows._replace(**{part: wrong}), PackedWeight((OUT, DIM), MINIMUM)
    with pytest.raises(ValueError, match=r"does not fit float16: load .* quantize='none'"):
        weight.write(0, rows)


def test_a_minimum_of_scales_near_the_limit_raises():
    """The minimum of rows without one is -8 * scale, which fp16 may not hold."""
    rows = random_rows(OUT, DIM, INT4)
    rows = rows._replace(scale=torch.full_like(rows.scale, 3e4))
    with pytest.raises(ValueError, match="does not fit float16"):
        PackedWeight((OUT, DIM), MINIMUM).write(0, rows)


@pytest.mark.parametrize("packing", [INT4, MINIMUM], ids=["signed", "minimum"])
def test_values_out_of_range_are_refused(packing):
    low, high = value_range(packing)
    for value in (low - 1, high + 1, -128, 127):
        rows = random_rows(OUT, DIM, packing)
        rows.values[7, 100] = value
        with pytest.raises(AssertionError, match="4 bits"):
            PackedWeight((OUT, DIM), packing).write(0, rows)


def test_rows_of_another_shape_are_refused():
    weight = PackedWeight((OUT, DIM), INT4)
    with pytest.raises(AssertionError):
        weight.write(0, random_rows(OUT, DIM - 32, INT4))
    with pytest.raises(AssertionError, match="no minimum"):
        weight.write(0, random_rows(OUT, DIM, MINIMUM))
    with pytest.raises(AssertionError, match="scale"):
        weight.write(0, random_rows(OUT, DIM, INT4._replace(group=16)))


class Model(nn.Module):
    def __init__(self, packing):
        super().__init__()
        self.norm = nn.Parameter(torch.ones(4), requires_grad=False)
        self.linear, _ = packed_weight(OUT, DIM, packing)


@pytest.mark.parametrize("packing", [INT8, MINIMUM], ids=["int8", "int4, minimum"])
def test_converting_the_model_leaves_a_packed_weight_as_it_is(packing):
    model = Model(packing)
    before = {name: x.clone() for name, x in model.linear.state_dict().items()}
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        model.to(dtype)
        assert model.norm.dtype == dtype
    model.half().share_memory().requires_grad_(False)
    for name, x in model.linear.state_dict().items():
        assert x.dtype == before[name].dtype and torch.equal(x, before[name]) and x.is_shared()


def test_the_model_moves_between_devices(device):
    model = Model(MINIMUM)
    expected = unpacked(model.linear)
    model.to(device, torch.float16)
    assert {x.device.type for x in model.parameters()} == {device}
    assert torch.equal(unpacked(model.linear).cpu(), expected)
    state = model.linear.state_dict()
    model.to("meta").to_empty(device=device)
    assert model.linear.device.type == device
    model.linear.load_state_dict(state)
    assert torch.equal(unpacked(model.linear).cpu(), expected)


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_copies_equal_the_original(packing):
    weight, _ = packed_weight(OUT, DIM, packing)
    other = PackedWeight((OUT, DIM), packing)
    other.load_state_dict(weight.state_dict())
    copies = copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), other
    expected = unpacked(weight)
    weight.data.zero_()
    for found in copies:
        assert found.packing == packing and torch.equal(unpacked(found), expected)
        assert not any(x.requires_grad for x in found.parameters())
