"""Compares decode_attention and attention on a CPU, in all dtypes, with a plain fp64 softmax."""

import decode_cases
import pytest
import torch
from attention_mistakes import OF_GEMMA_4, OF_ROTATION, OF_SOFTMAX
from c_kernels import BUILDS, built_for, needs_c
from cpu_tensors import DTYPES, same_bits, threads, unaligned
from decode_cases import CASES, Case
from oracles import angles

import gemma_fast.kernels.decode_attention as decode_file
from gemma_fast.kernels.attention import attention

pytestmark = needs_c


@pytest.fixture(params=BUILDS)
def build(request):
    with built_for(request.param):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_decode_attention_equals_fp64_softmax(case, dtype, build, poison_outputs, monkeypatch):
    monkeypatch.setattr(decode_file, "decode_attention_reference", None)
    Case("cpu", dtype, **CASES[case]).check()


# Block ends of the C kernel, which has blocks of 128 keys, and rings that end inside a block.
EDGES = {
    "last key of a block": {"past": [127, 255]},
    "first key of a block": {"past": [128, 256]},
    "window of whole blocks": {"past": [600, 255, 256], "window": 256, "m": 2},
    "window and a key": {"past": [600, 128, 129], "window": 129, "m": 2},
    "ring of whole blocks": {"past": [600, 255, 256, 257], "slots": 256},
    "ring of blocks and a slot": {"past": [600, 256, 257], "slots": 257},
    "head dim of no whole vector": {"past": [200, 3], "d": 20, "m": 2, "norm": True},
    "head dim of less than a vector": {"past": [200, 3], "d": 6, "n": 2, "softcap": 1.5},
    "17 query heads per kv head": {"past": [300], "m": 17, "d": 64},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", EDGES)
def test_block_ends_and_odd_head_dims_equal_fp64_softmax(case, dtype, build, poison_outputs):
    Case("cpu", dtype, **EDGES[case]).check()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_norm_weights_may_have_another_dtype(dtype, poison_outputs):
    case = Case("cpu", dtype, [70, 9], m=2, n=2, norm=True)
    case.norms = [x.float() for x in case.norms]
    case.check()


MANY = {"past": [900, 31, -1, 257], "spare": 5, "n": 2, "m": 3, "d": 64, "norm": True}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_do_not_depend_on_the_number_of_threads(dtype, build):
    found = []
    for count in (1, 2, 3):
        case = Case("cpu", dtype, **MANY)
        with threads(count):
            out = case.run()
        found.append(torch.cat([x.flatten() for x in (out, case.keys, case.values)]))
    assert same_bits(*found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_tensors_give_the_result_of_aligned_ones(dtype, build):
    expected = Case("cpu", dtype, **MANY).run()
    case = Case("cpu", dtype, **MANY)
    for name in ("qkv", "keys", "values", "cos", "sin", "position"):
        setattr(case, name, unaligned(getattr(case, name)))
    case.norms = [unaligned(x) for x in case.norms]
    assert torch.equal(case.run(), expected)


def prompt(dtype=torch.float32):
    """Returns arguments of attention: 3 rows of 150 tokens, 6 query heads and 2 kv heads, of which
    one row is padded, and one is in a ring that has wrapped."""
    q, rings = torch.randn(3, 150, 6, 64).to(dtype), torch.randn(2, 3, 2, 300, 64).to(dtype)
    start = torch.tensor([0, 40, 500], dtype=torch.int32)
    return [q, *rings, *angles(start, 150, 64), start, torch.randn(64)]


OPTIONS = {
    "scale": 0.3, "window": 170, "left_padding": torch.tensor([20, 0, 0], dtype=torch.int32),
}  # fmt: skip


@pytest.mark.parametrize("index", range(7), ids=["q", "k", "v", "cos", "sin", "offset", "norm"])
def test_strided_or_unaligned_tensors_of_prompts(index, build):
    """Every second number of a tensor, where the op takes it, and a tensor at an odd address."""
    given = prompt()
    expected = attention(*given, **OPTIONS)
    changes = [unaligned] if index in (3, 4, 5) else [unaligned, _spread]
    for change in changes:
        changed = [change(x) if i == index else x for i, x in enumerate(given)]
        torch.testing.assert_close(attention(*changed, **OPTIONS), expected, rtol=1e-4, atol=1e-5)


def _spread(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


# Layouts that the C kernel does not read, or only through a copy.
LAYOUTS = {
    "qkv": lambda x: torch.cat((x, x), dim=2)[..., : x.shape[2]],
    "values": lambda x: x.contiguous(),
    "keys, values": _channels_last,
    "cos, sin": lambda x: x.T.contiguous().T,
    "cos": lambda x: torch.cat((x, x), dim=1)[:, : x.shape[1]],
    "position": lambda x: x.repeat_interleave(2)[::2],
}


@pytest.mark.parametrize("names", LAYOUTS)
def test_strided_tensors_give_the_result_of_contiguous_ones(names):
    expected = Case("cpu", torch.float32, **MANY).run()
    case = Case("cpu", torch.float32, **MANY)
    for name in names.split(", "):
        x = getattr(case, name)
        setattr(case, name, LAYOUTS[names](x))
        assert getattr(case, name).stride() != x.stride()
    torch.testing.assert_close(case.run(), expected, rtol=1e-5, atol=1e-5)


def test_nan_reaches_the_heads_that_see_it_and_no_others(build):
    def run(slot, name):
        case = Case("cpu", torch.float32, [300, 300], n=2, m=2, window=150)
        getattr(case, name)[0, 1, slot] = float("nan")
        return case.run().isnan().any(-1)

    for name in ("keys", "values"):
        for slot in (151, 200, 299):
            assert run(slot, name).tolist() == [[False, False, True, True], [False] * 4]
        assert not run(150, name).any(), "the key is before the window"


def test_large_scores_do_not_overflow(build):
    case = Case("cpu", torch.float32, [300], m=2)
    case.qkv[:, :2] *= 1e6
    for out in case.run()[0]:  # the value of one key
        assert (out - case.values[0, 0]).abs().amax(-1).min() < 1e-6


@pytest.mark.parametrize("mistake", OF_SOFTMAX | OF_ROTATION | OF_GEMMA_4)
def test_checks_detect_mistakes(mistake, monkeypatch):
    name = "values normalized" if mistake in OF_GEMMA_4 else "all options together"
    Case("cpu", torch.float32, **CASES[name]).check()
    for oracle, wrong in (OF_SOFTMAX | OF_ROTATION | OF_GEMMA_4)[mistake].items():
        monkeypatch.setattr(decode_cases, oracle, wrong)
    with pytest.raises(AssertionError, match="times its bound"):
        Case("cpu", torch.float32, **CASES[name]).check()
