"""Compares decode_attention with a plain fp64 softmax over keys sorted by position."""

import decode_cases
import pytest
import torch
from attention_mistakes import OF_GEMMA_4, OF_ROTATION, OF_SOFTMAX
from c_kernels import without_c
from decode_cases import CASES, SCALE, Case, D, table
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DTYPES, multiprocessors
from oracles import angles
from tolerances import assert_rounded, attention_roundings, norm_roundings, pair_size
from triton_interpreter import interpreter

from gemma_fast.kernels.attention import attention
from gemma_fast.kernels.decode_attention import decode_attention
from gemma_fast.kernels.rotary import rotary_write


@pytest.fixture(params=["kernel", "kernel, 132 multiprocessors", "reference"])
def device(request):
    """Runs a test three times: on the kernel with few splits, on the kernel with many splits, and
    on the reference. Returns the device for the inputs. (test_cpu_attention.py runs C kernels.)"""
    if request.param == "reference":
        with without_c():
            yield "cpu"
        return
    with multiprocessors("132" in request.param), interpreter():
        yield "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_decode_attention_equals_fp64_softmax(case, dtype, device, poison_outputs):
    Case(device, dtype, **CASES[case]).check()


@pytest.mark.parametrize("mistake", OF_SOFTMAX | OF_ROTATION)
def test_check_detects_a_mistake(mistake, monkeypatch):
    Case("cpu", torch.float32, **CASES["all options together"]).check()
    for name, wrong in (OF_SOFTMAX | OF_ROTATION)[mistake].items():
        monkeypatch.setattr(decode_cases, name, wrong)
    with pytest.raises(AssertionError, match="times its bound"):
        Case("cpu", torch.float32, **CASES["all options together"]).check()


@pytest.mark.parametrize("mistake", OF_GEMMA_4)
def test_check_detects_a_mistake_in_an_option_of_gemma_4(mistake, monkeypatch):
    Case("cpu", torch.float32, **CASES["values normalized"]).check()
    for name, wrong in OF_GEMMA_4[mistake].items():
        monkeypatch.setattr(decode_cases, name, wrong)
    with pytest.raises(AssertionError, match="times its bound"):
        Case("cpu", torch.float32, **CASES["values normalized"]).check()


SHAPES = {
    "past": st.lists(
        st.integers(-3, 40) | st.integers(120, 135) | st.integers(0, 700), min_size=1, max_size=3
    ),
    "n": st.integers(1, 3),
    "m": st.integers(1, 5),
    "slots": st.none() | st.integers(1, 200) | st.sampled_from([64, 128, 512]),
    "window": st.none() | st.integers(1, 150),
    "softcap": st.none() | st.just(2.0),
    "norm": st.booleans(),
    "heads": st.sampled_from(["qkv", "qk", "q"]),
    "v_norm": st.booleans(),
    "offset": st.sampled_from([0.0, 1.0]),
    "spare": st.integers(0, 5),
    "seed": st.integers(0, 99),
}


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=st.fixed_dictionaries(SHAPES), many=st.booleans())
def test_any_shape_equals_fp64_softmax(shape, many):
    with multiprocessors(many), interpreter():
        Case("cuda" if torch.cuda.is_available() else "cpu", torch.float32, **shape).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding_a_prompt_equals_prefill(dtype, device):
    """Compares decode_attention, called once per token on a ring that wraps, with one call of
    attention for all tokens."""
    t, n, m, slots = 30, 2, 2, 13
    qkv = torch.randn(1, t, n * m + 2 * n, D, device=device).to(dtype)
    q, k, v = qkv.split((n * m, n, n), dim=2)
    q_norm, k_norm = torch.randn(2, D, device=device) / 2
    options = {"scale": SCALE, "window": slots}
    start = torch.zeros(1, dtype=torch.int32, device=device)
    keys, values = torch.zeros(2, 1, n, t, D, device=device, dtype=dtype)
    cos_sin = angles(start, t)
    rotary_write(k, v, keys, values, *cos_sin, start, k_norm)
    expected = attention(q, keys, values, *cos_sin, start, q_norm, **options)[0]

    cos, sin = table(t, D, device)
    ring, counter = torch.zeros(2, 1, n, slots, D, device=device, dtype=dtype), start.repeat(n)
    out = torch.cat([
        decode_attention(qkv[:, i], *ring, cos, sin, start + i, counter, q_norm, k_norm, **options)
        for i in range(t)
    ])  # fmt: skip
    assert_rounded(out, expected, size=1, **attention_roundings(D, slots, SCALE))
    last = keys[:, :, -1]
    assert_rounded(ring[0][:, :, (t - 1) % slots], last, norm_roundings(D) + 8, pair_size(last))


def test_unused_slots_do_not_change_the_result(device):
    shape = {"past": [20, 300, 0, -1], "slots": 400, "n": 2, "m": 2, "norm": True}
    outs = [Case(device, torch.float32, stale=x, **shape).run() for x in (1e4, -1e4, 0.0)]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_tokens_before_the_window_do_not_change_the_result(device):
    case, other = (
        Case(device, torch.float32, [300, 90], slots=400, window=50, m=2) for _ in range(2)
    )
    other.keys[0, :, :251], other.values[0, :, :251] = 1e4, -1e4
    assert torch.equal(case.run(), other.run())


def test_repeated_runs_give_the_same_bits(device):
    case = Case(device, torch.float32, [700, 650, 31], spare=5, n=2, m=4, norm=True)
    first, keys = case.run(), case.keys.clone()
    for options in ({}, {"pdl": True}, {}):
        assert torch.equal(case.run(**options), first) and torch.equal(case.keys, keys)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("position", [-1, -(1 << 30), -(1 << 30) + 12345])
def test_a_row_of_padding_gives_zeros_and_writes_nothing(position, window, device):
    """A paused row of a cache has a position far below zero."""
    n, slots = 2, 64
    qkv = torch.randn(2, 4 * n, D, device=device)
    keys, values = torch.randn(2, 2, n, slots, D, device=device)
    before = torch.stack((keys[1], values[1]))
    positions = torch.tensor([9, position], dtype=torch.int32, device=device)
    counter = torch.zeros(2 * n, dtype=torch.int32, device=device)
    options = {"scale": SCALE, "window": window}
    out = decode_attention(qkv, keys, values, *table(64, D, device), positions, counter, **options)
    assert out[0].all() and not out[1].any() and not counter.any()
    assert torch.equal(torch.stack((keys[1], values[1])), before)


def test_empty_batch_gives_an_empty_result(device):
    qkv, ring = torch.zeros(0, 6, D, device=device), torch.zeros(0, 1, 8, D, device=device)
    none = torch.zeros(0, dtype=torch.int32, device=device)
    out = decode_attention(qkv, ring, ring.clone(), *table(4, D, device), none, none, scale=1.0)
    assert out.shape == (0, 4, D)


@pytest.mark.gpu
def test_pdl_waits_for_the_previous_kernel():
    """With pdl, the op starts while the matmul that computes qkv is still running."""
    case = Case("cuda", torch.float16, [4000] * 4, spare=96, m=8, d=256)
    x, weight = torch.randn(4, 8192, device="cuda"), torch.randn(8192, 2560, device="cuda")
    for i in range(50):
        for pdl in (False, True):
            product = (x * (i + 1) / 800) @ weight
            case.qkv = product.half().view(4, 10, 256)
            out = case.run(pdl=pdl)
            if not pdl:
                expected = out
        assert torch.equal(out, expected)


def test_wrong_head_counts_or_a_single_norm_raise(device):
    keys, values = torch.randn(2, 1, 2, 4, D, device=device)
    cos, sin = table(4, D, device)
    position, counter = torch.zeros(2, 1, dtype=torch.int32, device=device)

    def call(count, norms=(), **options):
        qkv, more = torch.randn(1, count + 4, D, device=device), counter.repeat(2)
        return decode_attention(
            qkv, keys, values, cos, sin, position, more, *norms, scale=1.0, **options
        )

    assert call(4).shape == (1, 4, D)
    with pytest.raises(AssertionError, match="3 query heads are not a multiple of 2 kv heads"):
        call(3)
    with pytest.raises(AssertionError, match="norm q and k, or neither"):
        call(4, [torch.ones(D, device=device)])
    assert call(0, [torch.ones(D, device=device)], heads="q").shape == (1, 4, D)
    with pytest.raises(AssertionError, match="k_norm needs a key"):
        call(0, [torch.ones(D, device=device)] * 2, heads="q")
    with pytest.raises(AssertionError, match="heads='kv'"):
        call(4, heads="kv")


@pytest.mark.parametrize("device", ["kernel"], indirect=True)
def test_unsupported_head_dim_raises(device):
    with pytest.raises(AssertionError, match=r"one of \(32, 64, 128, 256, 512\): d=1024"):
        Case(device, torch.float32, [0], d=1024).run()
