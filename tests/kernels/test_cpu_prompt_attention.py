"""Compares attention of prompts on a CPU, in all dtypes, with a plain fp64 softmax over keys sorted
by position: ends of the C kernel's blocks, masks, rings, and numbers that are not finite."""

import sys

import attention_cases
import pytest
import torch
from attention_mistakes import OF_SOFTMAX
from c_kernels import BUILDS, built_for, needs_c
from cpu_tensors import DTYPES, same_bits, threads, unaligned
from oracles import angles, normed_and_rotated, softmax_attention
from tolerances import assert_rounded, attention_roundings

import gemma_fast.kernels.attention as attention_file
from gemma_fast.kernels.attention import attention

pytestmark = needs_c
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=BUILDS)
def build(request, monkeypatch):
    """Lets only the C kernel compute."""
    monkeypatch.setattr(attention_file, "attention_reference", None)
    with built_for(request.param):
        yield


class Prompt:
    """Builds t queries per row, from position past[row] on, and all keys up to the last query.

    left_padding  [b]: positions below it are padding; None: those below zero
    norm          offset of the norm's weight; None: no norm
    """

    def __init__(
        self, dtype, *, t, past=(0,), left_padding=None, n=1, m=1, d=32, slots=None, window=None,
        softcap=None, rotate=False, norm=None, spare=0, seed=0,
    ):  # fmt: skip
        torch.manual_seed(seed)
        self.t, self.past, self.left_padding, self.d = t, past, left_padding, d
        b, length = len(past), max(*past, 0) + t
        self.slots = slots or length + spare
        qkv = torch.randn(b, t, n * (m + 2), d).to(dtype)
        self.q = qkv[:, :, : n * m]  # [b, t, n * m, d], strided
        self.k, self.v = torch.randn(2, b, length, n, d).to(dtype)  # indexed by position
        self.start = torch.tensor(past, dtype=torch.int32)
        self.rotate = rotate or norm is not None
        self.weight = None if norm is None else torch.randn(d) / 2
        self.offset, self.scale = norm or 0.0, 0.3 * (32 / d) ** 0.5
        self.options = {
            "window": window, "softcap": softcap, "scale": self.scale, "offset": self.offset
        }  # fmt: skip
        if left_padding is not None:
            self.options["left_padding"] = torch.tensor(left_padding, dtype=torch.int32)

    def oldest(self, row):
        """Returns the oldest position that the ring holds and that is not padding."""
        first = self.left_padding[row] if self.left_padding else 0
        return max(first, self.past[row] + self.t - self.slots, 0)

    def rings(self):
        """Returns rings that are cut from longer ones :: [b, n, slots, d]. Unwritten slots have
        large numbers, and the slots that are cut off have NaN."""
        b, _, n, d = self.k.shape
        rings = torch.full((2, b, n, self.slots + 5, d), NAN, dtype=self.k.dtype)[..., :-5, :]
        rings.fill_(torch.finfo(self.k.dtype).max)
        for row, past in enumerate(self.past):
            end = past + self.t
            held = torch.arange(max(end - self.slots, 0), max(end, 0))
            for ring, x in zip(rings, (self.k, self.v), strict=True):
                ring[row, :, held % self.slots] = x[row, held].transpose(0, 1)
        return rings

    def run(self, copy=lambda x: x):
        cos_sin = angles(self.start, self.t, self.d) if self.rotate else (None, None)
        inputs = map(copy, (self.q, *self.rings()))
        return attention(*inputs, *cos_sin, self.start, self.weight, **self.options)

    def check(self):
        out = self.run()
        assert out.dtype == self.q.dtype and out.shape == self.q.shape and out.is_contiguous()
        for row, past in enumerate(self.past):
            oldest = self.oldest(row)
            padding = min(max(oldest - past, 0), self.t)
            assert (out[row, :padding] == 0).all(), "outputs of padding must be zero"
            if padding == self.t:
                continue
            at, seen = (
                torch.arange(past + padding, past + self.t),
                torch.arange(oldest, past + self.t),
            )
            q = self.q[row, padding:]
            if self.rotate:
                q = normed_and_rotated(q, at, self.weight, self.offset)
            exact, size = softmax_attention(
                q.double(), self.k[row, seen], self.v[row, seen], at, seen,
                self.options["window"], self.options["softcap"], self.scale,
            )  # fmt: skip
            found, nan = out[row, padding:], exact.isnan()
            assert torch.equal(found.isnan(), nan)
            found, exact, size = (x.masked_fill(nan, 0) for x in (found, exact, size))
            roundings = attention_roundings(self.d, len(seen), self.scale)
            assert_rounded(found, exact, size=size, **roundings)
        return out


ALL = {
    "t": 131, "past": (300, -2, 7), "n": 2, "m": 3, "window": 90, "slots": 233, "softcap": 2.0,
    "norm": 1.0,
}  # fmt: skip
# Blocks have 64 queries and 128 keys, panels 16 or 64 columns, and sums parts of 96 items.
CASES = {
    **{f"t {t}": {"t": t, "m": 2} for t in (1, 2, 63, 64, 65, 127, 128, 129, 300)},
    **{f"d {d}": {"t": 70, "d": d, "n": 2, "m": 2} for d in (2, 6, 64, 72, 192, 256, 512)},
    "odd d": {"t": 70, "d": 33},
    "16 query heads per kv head, d 512": {"t": 9, "past": (130,), "m": 16, "d": 512, "norm": 0.0},
    **{
        f"n {n}, m {m}": {"t": 66, "past": (0, 90), "n": n, "m": m}
        for n, m in ((1, 1), (1, 4), (2, 3), (4, 1))
    },
    **{
        f"window {window}": {"t": 200, "past": (0, 129), "window": window, "m": 2}
        for window in (1, 5, 64, 100, 128, 500)
    },
    "window from the last key of a block": {"t": 200, "window": 66},
    "soft cap": {"t": 140, "softcap": 1.5},
    "soft cap of Gemma 2": {"t": 140, "softcap": 50.0},
    "rotation": {"t": 70, "past": (5, 0), "rotate": True},
    "norm, 1 + weight": {"t": 70, "past": (5, 0), "norm": 1.0, "m": 2},
    "norm": {"t": 70, "past": (5, 0), "norm": 0.0, "n": 2},
    "one token after a long text": {"t": 1, "past": (700, 127, 128), "m": 4, "spare": 900},
    "few tokens after a long text": {"t": 5, "past": (700, 125), "n": 2},
    "past of whole blocks": {"t": 64, "past": (128, 256, 255)},
    "left padding": {"t": 150, "past": (-130, 0, -63), "m": 2},
    "rows of padding only": {"t": 70, "past": (0, -70, -90)},
    "left-padding offsets": {"t": 150, "past": (0, 0, 0), "left_padding": (0, 64, 129), "m": 2},
    "left-padding offsets, past": {
        "t": 70, "past": (200, 200, 0), "left_padding": (128, 205, 3), "window": 100,
    },
    "left-padding offsets, nothing visible": {
        "t": 70, "past": (0, 9, 2), "left_padding": (70, 400, -3),
    },
    "ring that wraps": {"t": 90, "past": (700, 3, 39), "window": 40, "slots": 129, "m": 2},
    "ring of whole blocks that wraps": {"t": 65, "past": (600, 191), "window": 64, "slots": 128},
    "ring with spare slots": {"t": 60, "past": (500,), "window": 140, "slots": 333, "n": 2},
    "ring shorter than the prompt": {"t": 190, "past": (400, 0), "slots": 70, "m": 2},
    "ring of one slot": {"t": 3, "past": (7, 0), "slots": 1},
    "ring with left padding": {"t": 90, "past": (60, 60), "slots": 100, "left_padding": (80, 0)},
    "all options together": ALL,
}  # fmt: skip


@DTYPE
@pytest.mark.parametrize("case", CASES)
def test_attention_equals_fp64_softmax(case, dtype, build, poison_outputs):
    Prompt(dtype, **CASES[case]).check()


@DTYPE
@pytest.mark.parametrize("case", attention_cases.CASES)
def test_attention_and_rotary_write_equal_fp64_softmax(case, dtype, build, poison_outputs):
    attention_cases.check("cpu", dtype, **attention_cases.CASES[case])


@DTYPE
def test_results_do_not_depend_on_the_number_of_threads(dtype, build):
    found = []
    for count in (1, 2, 3):
        with threads(count):
            found.append(Prompt(dtype, **ALL).run())
    assert same_bits(*found)


@DTYPE
def test_unaligned_tensors_give_the_result_of_aligned_ones(dtype, build):
    for case in (ALL, CASES["d 6"]):
        assert same_bits(Prompt(dtype, **case).run(unaligned), Prompt(dtype, **case).run())


# The keys 129 … 278 are visible to query 278.
WINDOWED = {"t": 300, "past": (0, 0), "n": 2, "m": 2, "window": 150}


def changes(dtype, change):
    """Returns the result for WINDOWED, changed by `change`, and which (row, query, head) of it
    differs from the result without the change."""
    one, other = Prompt(dtype, **WINDOWED), Prompt(dtype, **WINDOWED)
    change(other)
    before, after = one.run(), other.check()
    return after, (before != after).any(-1)


@DTYPE
@pytest.mark.parametrize("number", [NAN, INF])
def test_a_query_that_is_not_finite_changes_only_its_result(number, dtype, build):
    def change(prompt):
        prompt.q[0, 70, 1, 3] = number

    out, changed = changes(dtype, change)
    assert changed.nonzero().tolist() == [[0, 70, 1]] and out[0, 70, 1].isnan().all()


@DTYPE
@pytest.mark.parametrize("number", [NAN, INF])
@pytest.mark.parametrize("position", [100, 200])
def test_a_key_that_is_not_finite_changes_only_queries_that_see_it(position, number, dtype, build):
    def change(prompt):
        prompt.k[0, position, 1, 3] = number

    changed = changes(dtype, change)[1]
    seen = torch.zeros_like(changed)
    seen[0, position : position + 150, 2:] = True
    assert changed.any() and not (changed & ~seen).any()


@DTYPE
def test_nan_in_a_value_reaches_the_queries_that_see_it(dtype, build):
    """Hidden values are multiplied by 0, so it also reaches queries whose block has the value."""
    one, other = Prompt(dtype, **WINDOWED), Prompt(dtype, **WINDOWED)
    other.v[0, 200, 1, 3] = NAN
    before, out = one.run(), other.run()
    assert out[0, 200:, 2:, 3].isnan().all()
    out[0, 128:, 2:, 3] = before[0, 128:, 2:, 3]
    assert same_bits(out, before)


def test_large_scores_do_not_overflow(build):
    prompt = Prompt(torch.float32, t=300, m=2)
    prompt.q *= 1e6
    distance = prompt.run()[0].transpose(0, 1).unsqueeze(2) - prompt.v[0, :, 0]  # [m, t, s, d]
    assert (distance.abs().amax(-1).amin(-1) < 1e-6).all(), "not the value of one key"


@pytest.mark.parametrize("mistake", OF_SOFTMAX)
def test_check_detects_a_mistake(mistake, monkeypatch):
    Prompt(torch.float32, **ALL).check()
    for oracle, wrong in OF_SOFTMAX[mistake].items():
        monkeypatch.setattr(sys.modules[__name__], oracle, wrong)
    with pytest.raises(AssertionError, match="times its bound"):
        Prompt(torch.float32, **ALL).check()
