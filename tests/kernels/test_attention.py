"""Compares attention and rotary_write with a plain fp64 softmax over keys sorted by position."""

import re
from pathlib import Path
from types import SimpleNamespace

import attention_cases
import pytest
import torch
from attention_cases import CASES, D, check
from attention_mistakes import OF_GEMMA_4, OF_ROTATION, OF_SOFTMAX
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import DTYPES
from marks import slow
from oracles import angles, normed, normed_and_rotated
from tolerances import assert_rounded, attention_roundings, norm_roundings, pair_size
from triton_interpreter import interpreter

from gemma_fast.kernels import attention as attention_file
from gemma_fast.kernels.attention import attention
from gemma_fast.kernels.rotary import rotary_write


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_attention_equals_fp64_softmax(case, dtype, device, poison_outputs):
    check(device, dtype, **CASES[case])


@pytest.mark.parametrize("dtype", [*DTYPES[1:], *slow(torch.float32)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_attention_with_descriptors_equals_fp64_softmax(case, dtype, hopper, poison_outputs):
    check(hopper, dtype, **{"multiple": 128, **CASES[case]})


@pytest.mark.parametrize(("offset", "extra"), [(1, 0), (0, 4)], ids=["address", "strides"])
def test_unaligned_rings_give_the_result_of_aligned_copies(offset, extra, hopper):
    """Descriptors can read a ring only if its address and strides are multiples of 16 bytes."""
    size = 2 * 128 * (D + extra)
    memory = torch.randn(size + 1, device=hopper).half()[offset : size + offset]
    rings = memory.view(2, 1, 1, 128, D + extra)[..., :D]
    copies = rings.clone(memory_format=torch.contiguous_format)
    q = torch.randn(1, 20, 1, D, device=hopper).half()
    start = torch.zeros(1, dtype=torch.int32, device=hopper)
    out, expected = (
        attention(q, *x, *angles(start, 20), start, scale=0.3) for x in (rings, copies)
    )
    assert_rounded(out, expected, size=1, **attention_roundings(D, 20, 0.3))


def test_descriptors_are_used_only_if_the_ring_is_whole_blocks(hopper, monkeypatch):
    made = []
    make = attention_file.TensorDescriptor.from_tensor
    noted = SimpleNamespace(from_tensor=lambda *args: made.append(args) or make(*args))
    monkeypatch.setattr(attention_file, "TensorDescriptor", noted)
    check(hopper, torch.float16, t=64, multiple=128)
    assert len(made) == 2
    check(hopper, torch.float16, t=64, multiple=1, spare=1)
    assert len(made) == 2, "a descriptor was used for a ring that ends within a block"


@pytest.mark.parametrize("mistake", OF_SOFTMAX | OF_ROTATION)
def test_check_detects_a_mistake(mistake, monkeypatch):
    check("cpu", torch.float32, **CASES["all options together"])
    for name, wrong in (OF_SOFTMAX | OF_ROTATION)[mistake].items():
        monkeypatch.setattr(attention_cases, name, wrong)
    with pytest.raises(AssertionError, match="times its bound"):
        check("cpu", torch.float32, **CASES["all options together"])


SHAPES = {
    "t": st.integers(1, 40) | st.sampled_from([63, 64, 65, 127, 128, 129]),
    "past": st.lists(st.integers(-8, 40) | st.integers(120, 135), min_size=1, max_size=3),
    "n": st.integers(1, 3),
    "m": st.integers(1, 5),
    "window": st.none() | st.integers(1, 48) | st.integers(125, 131),
    "softcap": st.none() | st.just(2.0),
    "norm": st.booleans(),
    "offset": st.sampled_from([0.0, 1.0]),
    "v_norm": st.booleans(),
    "last": st.none() | st.integers(1, 20),
    "spare": st.integers(0, 5),
    "seed": st.integers(0, 99),
}


@pytest.mark.parametrize("mistake", OF_GEMMA_4)
def test_check_detects_a_mistake_in_an_option_of_gemma_4(mistake, monkeypatch):
    check("cpu", torch.float32, **CASES["all options of Gemma 4 together"])
    for name, wrong in OF_GEMMA_4[mistake].items():
        monkeypatch.setattr(attention_cases, name, wrong)
    with pytest.raises(AssertionError, match="times its bound"):
        check("cpu", torch.float32, **CASES["all options of Gemma 4 together"])


def check_any(device, dtype, shape, **options):
    shape["past"] = [max(p, -shape["t"]) for p in shape["past"]]
    shape["last"] = min(shape["last"] or shape["t"], shape["t"])
    if max(shape["past"]) + shape["t"] < 1:
        shape["past"][0] = 0
    check(device, dtype, **shape, **options)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.fixed_dictionaries(SHAPES))
def test_any_shape_equals_fp64_softmax(shape):
    with interpreter():
        check_any("cuda" if torch.cuda.is_available() else "cpu", torch.float32, shape)


@pytest.mark.slow
@settings(
    max_examples=10, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(shape=st.fixed_dictionaries(SHAPES))
def test_any_shape_with_descriptors_equals_fp64_softmax(hopper, shape):
    check_any(hopper, torch.float16, shape, multiple=128)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [32, 512])
def test_rotary_write_normalizes_values(d, dtype, device):
    """K = V: both are read from the same heads. Values are rounded once."""
    t, slots = 11, 16
    k = torch.randn(2, t, 3, 2 * d, device=device).to(dtype)[..., d:]
    weight = torch.randn(d, device=device)
    start = torch.tensor([-4, 20], dtype=torch.int32, device=device)
    keys, values = torch.full((2, 2, 3, slots, d), 7.0, dtype=dtype, device=device)
    rotary_write(k, k, keys, values, *angles(start, t, d), start, weight, 1e-6, 0.0, True)
    for row, first in enumerate(start.tolist()):
        new = torch.arange(max(first, 0), first + t, device=device)
        heads = k[row, -len(new) :]
        exact = normed_and_rotated(heads, new, weight, 0.0)
        found = keys[row, :, new % slots].transpose(0, 1)
        assert_rounded(found, exact, norm_roundings(d) + 8, pair_size(exact))
        found = values[row, :, new % slots].transpose(0, 1)
        assert_rounded(found, normed(heads), norm_roundings(d))


def test_ring_keeps_the_last_tokens_of_a_longer_chunk(device):
    slots, t = 8, 21
    k, v = torch.randn(2, 1, t, 1, D, device=device)
    start = torch.tensor([5], dtype=torch.int32, device=device)
    ring, whole = (torch.zeros(2, 1, 1, s, D, device=device) for s in (slots, 64))
    for keys, values in (ring, whole):
        rotary_write(k, v, keys, values, *angles(start, t), start)
    for position in range(5 + t - slots, 5 + t):
        assert torch.equal(ring[..., position % slots, :], whole[..., position, :])


def test_without_a_window_a_query_sees_the_whole_ring(device):
    slots, start = 16, torch.tensor([45], dtype=torch.int32, device=device)
    q, keys, values = torch.randn(3, 1, slots, slots, D, device=device)
    cos_sin = angles(start, 1)
    out, longer, windowed = (
        attention(q[:, :1], keys, values, *cos_sin, start, scale=0.3, window=window)
        for window in (None, slots + 9, slots)
    )
    for other in (out, longer):
        assert_rounded(other, windowed, size=1, **attention_roundings(D, slots, 0.3))


def test_future_keys_do_not_change_the_result(device):
    """The future key has a far larger score than the visible key."""
    q, values = torch.ones(1, 2, 1, D, device=device), torch.randn(1, 1, 2, D, device=device)
    keys = (
        torch.tensor([-1000.0, 1000.0], device=device)
        .view(1, 1, 2, 1)
        .expand_as(values)
        .contiguous()
    )
    cos, sin = torch.ones(1, 2, D // 2, device=device), torch.zeros(1, 2, D // 2, device=device)
    start = torch.zeros(1, dtype=torch.int32, device=device)
    assert torch.equal(
        attention(q, keys, values, cos, sin, start, scale=1.0)[0, :, 0], values[0, 0]
    )


def test_rotation_distinguishes_large_positions(device):
    """bf16 cannot distinguish positions 300 and 301, but their rotated keys must differ."""
    x = torch.randn(1, 2, 1, D, device=device).to(torch.float32)
    x[:, 1] = x[:, 0]
    start = torch.tensor([300], dtype=torch.int32, device=device)
    keys, values = torch.zeros(2, 1, 1, 512, D, device=device)
    rotary_write(x, x, keys, values, *angles(start, 2), start)
    assert (keys[0, 0, 300] - keys[0, 0, 301]).abs().max() > 0.1


@pytest.mark.parametrize("device", ["kernel"], indirect=True)
def test_unsupported_head_dim_raises(device):
    q, start = torch.randn(1, 1, 1, 1024, device=device), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(AssertionError, match=r"one of \(32, 64, 128, 256, 512\): d=1024"):
        attention(q, q, q, *angles(start.to(device), 1, 1024), start.to(device), scale=1.0)


def test_query_heads_must_be_a_multiple_of_kv_heads(device):
    q, kv = torch.randn(1, 2, 3, D, device=device), torch.randn(1, 2, 4, D, device=device)
    start = torch.zeros(1, dtype=torch.int32, device=device)
    with pytest.raises(AssertionError, match="3 query heads are not a multiple of 2 kv heads"):
        attention(q, kv, kv, *angles(start, 2), start, scale=1.0)


@pytest.mark.parametrize("page", ["kernels/attention.py", "docs/kernels.md"])
def test_picture_of_the_key_axis_shows_the_visible_keys(page):
    """The picture shows queries 21 … 26, a window of 18, and blocks of 4 keys from position 4."""
    visible = attention_file.visible_keys(torch.tensor([21]), None, 6, 28, window=18)[0]  # [6, 28]
    lines = (Path(__file__).parents[2] / page).read_text().splitlines()
    header = next(i for i, line in enumerate(lines) if line.strip().startswith("position     4 "))
    column = {int(x[0]): x.start() for x in re.finditer(r"\d+", lines[header])}
    for i, row in enumerate(visible):
        blocks = ["".join("█" if x else "·" for x in keys) for keys in row[4:].view(-1, 4)]
        line = lines[header + 1 + i].strip()
        assert line.startswith(f"query {21 + i}     {' '.join(blocks)}")

    blocks = visible.view(6, 7, 4)
    visited = blocks.any(dim=2).any(dim=0).nonzero().flatten() * 4
    assert visited.tolist() == list(column) == [4, 8, 12, 16, 20, 24]
    unmasked = blocks.all(dim=2).all(dim=0).nonzero().flatten() * 4
    assert unmasked.tolist() == [12, 16]
    parts = [x.start() for x in re.finditer("[└┴]", lines[header + 7])]
    assert parts == [column[4], column[12], column[20]]
    begins = [begin for begin in range(25) if visible[:, begin : begin + 4].all()]
    assert begins == [*range(9, 19)]  # unmasked_begin … unmasked_end - 1

    ring = next(i for i, line in enumerate(lines) if line.strip().startswith("slot  "))
    slots, positions = ([*re.finditer(r"\d+", line)] for line in lines[ring : ring + 2])
    assert [int(x[0]) for x in slots] == [0, 6, 15, 0, 5]
    assert [int(x[0]) for x in positions] == [16, 22, 31, 32, 37]
    for slot, position in zip(slots, positions, strict=True):
        assert int(position[0]) % 16 == int(slot[0]) and position.start() == slot.start()
