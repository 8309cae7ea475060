"""Compares split_attention and attention with fp64. Queries are already rotated, the cache already
holds all keys, and the oldest keys of a row may be left padding."""

import pytest
import torch
from attention_mistakes import OF_SOFTMAX
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DTYPES, multiprocessors
from oracles import softmax_attention
from tolerances import assert_rounded, attention_roundings
from triton_interpreter import interpreter

from gemma_fast.kernels.attention import attention
from gemma_fast.kernels.decode_attention import split_attention

D, SCALE = 32, 0.3


def check(
    device, dtype, left_padding, *, t=1, past=0, n=1, m=1, d=D, spare=0, slots=None, window=None,
    softcap=None, seed=0,
):  # fmt: skip
    """Compares t queries, at positions past … past + t - 1, with fp64. Positions of a row below
    left_padding[row] are padding."""
    torch.manual_seed(seed)
    b, total, make = len(left_padding), past + t, {"device": device, "dtype": dtype}
    slots = slots or total + spare
    q = torch.randn(b, t, n * m, 2 * d, **make)[..., :d]  # [b, t, n * m, d], strided
    k, v = torch.randn(2, b, total, n, d, **make)
    keys, values = torch.full((2, b, slots, n, d), torch.finfo(dtype).max, **make)
    held = torch.arange(max(total - slots, 0), total, device=device)
    keys[:, held % slots], values[:, held % slots] = k[:, held], v[:, held]
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    start, begin = torch.tensor([[past] * b, left_padding], dtype=torch.int32, device=device)
    scale = SCALE * (D / d) ** 0.5  # so scores and errors do not depend on d
    options = {"scale": scale, "window": window, "softcap": softcap}
    if t == 1:
        counter = torch.zeros(b * n, dtype=torch.int32, device=device)
        out = split_attention(q[:, 0], keys, values, start, begin, counter, **options).unsqueeze(1)
        assert not counter.any(), "the kernel did not reset its counters"
    else:
        out = attention(q, keys, values, None, None, start, left_padding=begin, **options)
    assert out.dtype == dtype and out.shape == q.shape and not out.isnan().any()
    for row, oldest in enumerate(left_padding):
        padding = min(max(oldest - past, 0), t)
        assert (out[row, :padding] == 0).all(), "outputs of padding must be zero"
        if padding == t:
            continue
        at = torch.arange(past + padding, total, device=device)
        seen = held[held >= oldest]
        exact, size = softmax_attention(
            q[row, padding:].double(), k[row, seen], v[row, seen], at, seen, window, softcap, scale
        )
        roundings = attention_roundings(d, len(seen), scale)
        assert_rounded(out[row, padding:], exact, size=size, **roundings)


CASES = {
    "first token": {"left_padding": [0]},
    "no padding": {"left_padding": [0, 0], "past": 70, "m": 4},
    "padding": {"left_padding": [0, 3, 69, 70], "past": 70, "n": 2, "m": 2},
    "padding past a block": {"left_padding": [130, 64, 65, 0], "past": 300, "m": 8, "d": 64},
    "query in the padding": {"left_padding": [9, 0], "past": 5},
    "padding before the window": {"left_padding": [3, 60], "past": 70, "window": 20},
    "ring that wraps": {"left_padding": [0, 95], "past": 100, "slots": 32, "window": 32},
    "ring of 13 slots that wraps": {
        "left_padding": [5, 99], "past": 100, "slots": 13, "window": 13, "m": 2,
    },
    "spare slots": {"left_padding": [0, 7], "past": 40, "spare": 500},
    "soft cap": {"left_padding": [2, 0], "past": 80, "softcap": 1.5, "m": 2},
    "many splits": {"left_padding": [600, 0], "past": 999, "m": 2},
    "prompt": {"left_padding": [0, 0], "t": 70, "m": 2},
    "padded prompt": {"left_padding": [0, 1, 33, 69], "t": 70, "n": 2, "m": 2},
    "rows of padding only": {"left_padding": [9, 40], "t": 9, "spare": 3},
    "chunk": {"left_padding": [0, 20, 41], "t": 30, "past": 40, "m": 4},
    "chunk in a window": {
        "left_padding": [0, 60], "t": 50, "past": 40, "window": 16, "softcap": 2.0,
    },
    "chunk, spare slots": {"left_padding": [0, 33], "t": 5, "past": 60, "spare": 100, "window": 16},
    "d 512": {"left_padding": [0, 20], "past": 90, "d": 512, "m": 8},
    "chunk, d 512": {"left_padding": [0, 70], "t": 20, "past": 64, "d": 512, "m": 8},
    "chunk, d 256": {"left_padding": [0, 70], "t": 20, "past": 64, "d": 256, "m": 8},
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_attention_over_a_cache_equals_fp64(case, dtype, device, poison_outputs):
    check(device, dtype, **CASES[case])


@pytest.mark.parametrize("t", [1, 50])
@pytest.mark.parametrize("mistake", OF_SOFTMAX)
def test_check_detects_a_mistake(mistake, t, monkeypatch):
    options = {"t": t, "past": 40, "window": 16, "softcap": 2.0}
    check("cpu", torch.float32, [0, 30], **options)
    for name, wrong in OF_SOFTMAX[mistake].items():
        monkeypatch.setitem(globals(), name, wrong)
    with pytest.raises(AssertionError, match="times its bound"):
        check("cpu", torch.float32, [0, 30], **options)


SHAPES = {
    "left_padding": st.lists(st.integers(0, 90) | st.integers(120, 135), min_size=1, max_size=3),
    "t": st.just(1) | st.integers(2, 40),
    "past": st.integers(0, 40) | st.integers(0, 300),
    "n": st.integers(1, 3),
    "m": st.integers(1, 5),
    "window": st.none() | st.integers(1, 150),
    "softcap": st.none() | st.just(2.0),
    "spare": st.integers(0, 40),
    "seed": st.integers(0, 99),
}


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=st.fixed_dictionaries(SHAPES), many=st.booleans())
def test_any_shape_equals_fp64(shape, many):
    with multiprocessors(many), interpreter():
        check("cuda" if torch.cuda.is_available() else "cpu", torch.float32, **shape)


def test_no_left_padding_equals_left_padding_of_zero(device):
    q, keys, values = torch.randn(3, 2, 2, 9, D, device=device)
    start = torch.tensor([8, 8], dtype=torch.int32, device=device)
    counter = torch.zeros(4, dtype=torch.int32, device=device)
    query = q[:, :, 0].contiguous()
    with_zero = split_attention(query, keys, values, start, start * 0, counter, scale=SCALE)
    assert torch.equal(
        split_attention(query, keys, values, start, None, counter, scale=SCALE), with_zero
    )


def test_empty_batch_gives_an_empty_result(device):
    keys, none = torch.zeros(0, 1, 8, D, device=device), torch.zeros(0, dtype=torch.int32)
    none = none.to(device)
    q = torch.zeros(0, 4, D, device=device)
    assert split_attention(q, keys, keys, none, none, none, scale=1.0).shape == (0, 4, D)


def test_query_heads_must_be_a_multiple_of_kv_heads(device):
    keys, values = torch.randn(2, 1, 2, 4, D, device=device)
    position, counter = torch.zeros(2, 1, dtype=torch.int32, device=device)
    q = torch.randn(1, 3, D, device=device)
    with pytest.raises(AssertionError, match="3 query heads are not a multiple of 2 kv heads"):
        split_attention(q, keys, values, position, None, counter.repeat(2), scale=1.0)
