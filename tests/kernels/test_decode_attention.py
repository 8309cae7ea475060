"""Compares decode_attention with a plain fp64 softmax over keys sorted by position."""

import pytest
import torch
from attention_mistakes import OF_GEMMA_4, OF_ROTATION, OF_SOFTMAX
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DTYPES, multiprocessors
from oracles import angles, normed, normed_and_rotated, softmax_attention
from tolerances import assert_rounded, attention_roundings, norm_roundings, pair_size
from triton_interpreter import interpreter

from gemma_fast.kernels.attention import attention
from gemma_fast.kernels.decode_attention import decode_attention
from gemma_fast.kernels.rotary import rotary_write

D, SCALE = 32, 0.3


@pytest.fixture(params=["kernel", "kernel, 132 multiprocessors", "reference"])
def device(request):
    """Runs a test three times: on the kernel with few splits, on the kernel with many splits, and
    on the reference. Returns the device for the inputs."""
    if request.param == "reference":
        yield "cpu"
        return
    with multiprocessors("132" in request.param), interpreter():
        yield "cuda" if torch.cuda.is_available() else "cpu"


def table(positions, d, device):
    """Returns cos and sin :: [positions, d / 2] of positions 0, 1, …"""
    start = torch.zeros(1, dtype=torch.int32, device=device)
    return (x[0].contiguous() for x in angles(start, positions, d))


class Case:
    """Builds rings that contain each row's tokens before position past[row], or, if heads = "q", up
    to this position. Also builds q, k and v of the token at past[row]. If past[row] is negative,
    that token is left padding."""

    def __init__(
        self, device, dtype, past, *, n=1, m=1, d=D, slots=None, spare=0, window=None,
        softcap=None, norm=False, heads="qkv", v_norm=False, offset=1.0, stale=None, seed=0,
    ):  # fmt: skip
        torch.manual_seed(seed)
        self.b, self.n, self.m, self.past, self.heads = len(past), n, m, past, heads
        length = max(*past, 0) + 1
        self.slots = slots or length + spare
        make = {"device": device, "dtype": dtype}
        self.norms = [torch.randn(d, **make) / 2 if norm else None for _ in "qk"]
        # k, v :: [b, length, n, d]: past and new tokens, indexed by position.
        self.k, self.v = torch.randn(2, self.b, length, n, d, **make)
        self.v = self.k if heads == "qk" else self.v
        self.q = torch.randn(self.b, 1, n * m, d, **make)
        new = torch.tensor([max(p, 0) for p in past])
        rows = torch.arange(self.b)
        given = [self.q[:, 0], self.k[rows, new], self.v[rows, new]][: len(heads)]
        apart = torch.randn(self.b, n * m + (len(heads) - 1) * n + 3, d, **make)
        self.qkv = apart[:, 1:-2].copy_(torch.cat(given, dim=1))
        self.offset = offset
        self.exact_v = normed(self.v) if v_norm else self.v  # values in the ring
        # Attention multiplies unwritten slots by 0, so they may hold any finite number.
        stale = torch.finfo(dtype).max if stale is None else stale
        self.keys, self.values = torch.full((2, self.b, self.slots, n, d), stale, **make)
        for row, p in enumerate(past):
            end = p + (heads == "q")
            old = torch.arange(max(end - self.slots, 0), max(end, 0), device=device)
            k = normed_and_rotated(self.k[row, old], old, self.norms[1], offset).to(dtype)
            self.keys[row, old % self.slots] = k
            self.values[row, old % self.slots] = self.exact_v[row, old].to(dtype)
        self.keys, self.values = self.keys.transpose(1, 2), self.values.transpose(1, 2)
        self.position = torch.tensor(past, dtype=torch.int32, device=device)
        self.counter = torch.zeros(self.b * n + 1, dtype=torch.int32, device=device)
        self.cos, self.sin = table(length, d, device)
        self.options = {
            "scale": SCALE, "window": window, "softcap": softcap, "heads": heads, "v_norm": v_norm,
            "offset": offset,
        }  # fmt: skip

    def run(self, **options):
        out = decode_attention(
            self.qkv, self.keys, self.values, self.cos, self.sin, self.position, self.counter,
            *self.norms[: 1 if self.heads == "q" else 2], **self.options, **options,
        )  # fmt: skip
        assert not self.counter.any(), "the kernel did not reset its counters"
        return out

    def check(self):
        before = self.keys.clone(), self.values.clone()
        out = self.run()
        dtype, d = self.qkv.dtype, self.qkv.shape[2]
        assert out.dtype == dtype and out.is_contiguous() and not out.isnan().any()
        for row, p in enumerate(self.past):
            if p < 0:
                assert (out[row] == 0).all(), "outputs of padding must be zero"
                continue
            slot, new = p % self.slots, torch.tensor([p], device=out.device)
            if self.heads != "q":
                k = normed_and_rotated(self.k[row, new], new, self.norms[1], self.offset)[0]
                found, v = self.keys[row, :, slot], self.values[row, :, slot]
                assert_rounded(found, k, norm_roundings(d) + 8, pair_size(k))
                if self.options["v_norm"]:
                    assert_rounded(v, self.exact_v[row, p], norm_roundings(d))
                else:
                    assert torch.equal(v, self.v[row, p])
                before[0][row, :, slot], before[1][row, :, slot] = found, v

            seen = min(self.slots, self.options["window"] or self.slots)
            positions = torch.arange(p + 1, device=out.device)
            exact, size = softmax_attention(
                normed_and_rotated(self.q[row], new, self.norms[0], self.offset),
                normed_and_rotated(
                    self.k[row, positions], positions, self.norms[1], self.offset
                ).to(dtype),
                self.exact_v[row, positions].to(dtype),
                new, positions, seen, self.options["softcap"], SCALE,
            )  # fmt: skip
            roundings = attention_roundings(d, min(seen, p + 1), SCALE)
            assert_rounded(out[row], exact[0], size=size[0], **roundings)
        rings = self.keys, self.values
        assert all(map(torch.equal, rings, before)), "a slot other than the new token's was written"


GEMMA_4 = {"norm": True, "v_norm": True, "offset": 0.0}
CASES = {
    "first token": {"past": [0]},
    "second token": {"past": [1], "m": 8},
    "multi-query": {"past": [150], "m": 8},
    "grouped": {"past": [70], "n": 2, "m": 2},
    "odd group": {"past": [70], "n": 2, "m": 3},
    "multi-head": {"past": [70], "n": 4},
    "16 query heads per kv head": {"past": [40], "m": 16},
    "d 64": {"past": [70], "m": 2, "d": 64, "norm": True},
    "d 128": {"past": [70], "m": 2, "d": 128, "norm": True},
    "d 256": {"past": [70], "m": 8, "d": 256},
    "soft cap": {"past": [70], "softcap": 1.5},
    "q and k norm": {"past": [70], "m": 4, "norm": True},
    "last key of a block": {"past": [63], "m": 2},
    "first key of a block": {"past": [64], "m": 2},
    "window of one": {"past": [70], "window": 1},
    "window smaller than a block": {"past": [70], "window": 5, "slots": 13},
    "window larger than a block": {"past": [170], "window": 100},
    "window larger than the text": {"past": [30], "window": 64},
    "window as long as the ring": {"past": [299], "window": 128, "slots": 128, "m": 4},
    "ring that wraps": {"past": [200, 128, 127], "slots": 128},
    "ring of 13 slots that wraps": {"past": [200, 5, 12, 13, 14], "slots": 13, "m": 2},
    "ring of one slot": {"past": [7, 0], "slots": 1},
    "few slots used": {"past": [0, 3], "spare": 700, "m": 2},
    "ragged rows": {"past": [3, 90, 0, 41], "spare": 9, "m": 4},
    "left padding": {"past": [-1, 80, -7], "m": 2, "n": 2},
    "rows of padding only": {"past": [-3, -1]},
    "many splits": {"past": [999, 400], "m": 2, "spare": 25},
    "more splits than one iteration merges": {"past": [340], "m": 16, "d": 256},
    "values are keys": {"past": [70, -2, 3], "n": 2, "m": 2, "heads": "qk"},
    "values are keys, normalized": {"past": [70, 8], "m": 3, "heads": "qk", **GEMMA_4},
    "values normalized": {"past": [70, -1], "n": 2, "m": 2, "slots": 23, **GEMMA_4},
    "only queries": {"past": [70, -2, 0], "n": 2, "m": 2, "heads": "q"},
    "only queries, ring that wraps": {
        "past": [70, 5, -1], "m": 4, "slots": 13, "window": 9, "heads": "q", **GEMMA_4,
    },
    "only queries, many splits": {"past": [700, 64], "m": 2, "heads": "q", **GEMMA_4},
    "d 512": {"past": [70, -1], "m": 8, "d": 512, **GEMMA_4},
    "d 512, 16 query heads per kv head": {
        "past": [340], "m": 16, "d": 512, "heads": "qk", **GEMMA_4,
    },
    "d 512, only queries": {"past": [90], "m": 4, "n": 2, "d": 512, "heads": "q", **GEMMA_4},
    "all options together": {
        "past": [300, -2, 7, 129], "n": 2, "m": 3, "window": 90, "slots": 101, "softcap": 2.0,
        "norm": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_decode_attention_equals_fp64_softmax(case, dtype, device, poison_outputs):
    Case(device, dtype, **CASES[case]).check()


@pytest.mark.parametrize("mistake", OF_SOFTMAX | OF_ROTATION)
def test_check_detects_a_mistake(mistake, monkeypatch):
    Case("cpu", torch.float32, **CASES["all options together"]).check()
    for name, wrong in (OF_SOFTMAX | OF_ROTATION)[mistake].items():
        monkeypatch.setitem(globals(), name, wrong)
    with pytest.raises(AssertionError, match="times its bound"):
        Case("cpu", torch.float32, **CASES["all options together"]).check()


@pytest.mark.parametrize("mistake", OF_GEMMA_4)
def test_check_detects_a_mistake_in_an_option_of_gemma_4(mistake, monkeypatch):
    Case("cpu", torch.float32, **CASES["values normalized"]).check()
    for name, wrong in OF_GEMMA_4[mistake].items():
        monkeypatch.setitem(globals(), name, wrong)
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
