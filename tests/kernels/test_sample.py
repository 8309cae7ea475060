"""Compares sample_token with its reference, and tests its random noise."""

import pytest
import torch
import triton
import triton.language as tl
from kernel_checks import DTYPES, chosen, sampled
from tolerances import assert_rounded
from triton_interpreter import interpreter

from gemma_fast.kernels import sample
from gemma_fast.kernels.sample import gumbel, gumbel_reference, philox_reference, sample_token

INF, NAN = float("inf"), float("nan")
# Roundings of the noise. A relative error of the inner logarithm is an absolute error of the outer.
TWO_LOGARITHMS = 8


def sample_from(logits, temperature=None, seed=None, position=None):
    return chosen(
        sample_token, logits, b=len(logits), device=logits.device, position=position,
        temperature=temperature, seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)  # fmt: skip
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    found = philox_reference(tuple(torch.tensor([c]) for c in counter), torch.tensor([key]))
    assert tuple(int(x) for x in found) == expected


def test_token_v_uses_random_number_v_mod_4_of_philox_counter_v_div_4():
    seed, position = torch.tensor([(3 << 32) + 1]), torch.tensor([9, 10], dtype=torch.int32)
    noise = gumbel_reference(seed, position, 11)
    for row, v in ((0, 0), (0, 10), (1, 3), (1, 4)):
        counter = (v // 4, int(position[row]), 0, 0)
        drawn = philox_reference(tuple(torch.tensor([c]) for c in counter), seed)[v % 4]
        u = (drawn.double() + 0.5) / 2**32
        assert_rounded(noise[row, v], -(-torch.log1p(-u)).log().squeeze(), TWO_LOGARITHMS, size=1)


with interpreter():  # the interpreter runs only kernels that are defined in this context

    @triton.jit
    def _noise_kernel(token_ptr, noise_ptr, seed, TOKENS: tl.constexpr):
        place, zero = tl.arange(0, TOKENS)[:, None], tl.zeros([1, 1], tl.int32)
        tl.store(noise_ptr + place, gumbel(seed, zero, tl.load(token_ptr + place)))


def test_noise_of_the_kernel_is_exact_in_both_tails():
    """The last two tokens have the random numbers r = 3 and r = 2**32 - 9. In fp32, the kernel must
    clamp u = (r + 0.5) / 2**32, because r = 2**32 - 9 would give u = 1."""
    token, zero = torch.tensor([*range(1022), 66929077, 8036761]), torch.tensor([0])
    drawn = philox_reference((token // 4, zero, zero, zero), torch.tensor([5]))
    r = torch.stack(drawn, dim=-1).gather(1, token[:, None] % 4)
    assert r[-2:].tolist() == [[3], [2**32 - 9]]
    u = ((r.float() + 0.5) * 2**-32).clamp(max=1 - 2**-24).double()
    with interpreter():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        noise = torch.empty(1024, 1, device=device)
        _noise_kernel[(1,)](token.int().to(device), noise, 5, TOKENS=1024)
    expected = -(-torch.log1p(-u)).log()
    # Where u ≥ 0.01, the kernel rounds 1 - u, by up to 2^-25.
    size = 1 + (u >= 0.01) / (-4 * torch.log1p(-u))
    assert_rounded(noise.cpu(), expected, TWO_LOGARITHMS, size)


@pytest.mark.parametrize("drawn", [0, 2**32 - 1], ids=["smallest", "largest"])
def test_noise_of_extreme_random_numbers_is_finite(drawn, monkeypatch):
    monkeypatch.setattr(sample, "philox_reference", lambda *_: 4 * (torch.full((1, 2), drawn),))
    assert gumbel_reference(torch.tensor([1]), torch.tensor([0]), 8).isfinite().all()


def test_noise_has_the_gumbel_distribution_in_its_tails_too():
    noise = gumbel_reference(torch.tensor([1]), torch.arange(8, dtype=torch.int32), 262_144)
    assert noise.isfinite().all()
    for x in (-2.0, -1.0, 0.0, 1.0, 3.0, 8.0, 11.0):  # P(noise ≤ x) = exp(-exp(-x))
        x = torch.tensor(x, dtype=torch.float64)
        due = -torch.expm1(-torch.exp(-x))  # P(noise > x)
        spread = (due * (1 - due) / noise.numel()).sqrt()
        assert ((noise > x).double().mean() - due).abs() < 5 * spread


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("b", "vocab"), [(1, 199), (3, 1000), (2, 4099), (9, 5), (0, 7)], ids=str)
def test_sample_token_equals_reference(b, vocab, dtype, poison_outputs):
    logits = torch.randn(b, vocab).to(dtype)
    logits[:, ::3] = -INF
    for options in ((), sampled()):
        expected = sample_from(logits, *options)
        assert (expected % 3 != 0).all()
        with interpreter():
            device = "cuda" if torch.cuda.is_available() else "cpu"
            given = [x.to(device) for x in (logits, *options)]
            assert torch.equal(sample_from(*given).cpu(), expected)


@pytest.mark.parametrize("temperature", [None, 1.0], ids=["greedy", "sampled"])
def test_non_finite_logits_give_token_minus_one(temperature, device):
    logits = torch.randn(5, 2100, device=device)
    logits[0, 1500], logits[1, 3], logits[2] = NAN, INF, -INF
    logits[3, 1:] = -INF
    options = () if temperature is None else sampled(temperature, device=device)
    token = sample_from(logits, *options).tolist()
    assert token[:4] == [-1, -1, -1, 0] and token[4] >= 0


def test_equal_logits_give_the_lowest_id(device, monkeypatch):
    monkeypatch.setattr(sample, "PARTIALS", 1)  # CHUNK = 4, less than the 5 programs
    logits = torch.zeros(3, 5000, device=device)
    logits[1, [1023, 1024, 4999]] = 1.0
    logits[2, [3500, 4999]], logits[2, 7] = 1.0, -0.0
    assert sample_from(logits).tolist() == [0, 1023, 3500]


def test_sampled_tokens_follow_the_probabilities():
    """Chi-square with 7 degrees of freedom exceeds 24.3 one time in a thousand."""
    logits, draws = torch.randn(1, 8), 40_000
    position = torch.arange(draws, dtype=torch.int32)
    token = sample_from(logits.expand(draws, -1), *sampled(1.5), position)
    due = draws * (logits[0].double() / 1.5).softmax(-1)
    assert ((token.bincount(minlength=8) - due).square() / due).sum() < 24.3


def test_noise_depends_on_seed_and_position_only(device):
    logits = torch.zeros(6, 500, device=device)
    position = torch.tensor([0, 1, 2, 3, 3, 3], dtype=torch.int32, device=device)
    first = sample_from(logits, *sampled(device=device), position)
    assert torch.equal(sample_from(logits, *sampled(device=device), position), first)
    assert len(set(first.tolist())) == 4 and len(set(first[3:].tolist())) == 1
    for other in (1, 77, (4 << 40) + 77):  # the default seed of `sampled` is (5 << 40) + 77
        again = sample_from(logits, *sampled(seed=other, device=device), position)
        assert (again != first).sum() >= 5


def test_wrong_shapes_and_dtypes_raise(device):
    logits = torch.randn(3, 10, device=device)
    position = torch.zeros(3, dtype=torch.int32, device=device)
    token, counter = torch.zeros(3, dtype=torch.int64, device=device), torch.zeros_like(position)
    temperature, seed = (x.expand(3).contiguous() for x in sampled(device=device))
    sample_token(logits, position, token, counter, temperature, seed)
    for wrong in (
        (position[:2], token, counter), (position, token.int(), counter),
        (position.long(), token, counter), (position, token, counter[:2]),
        (position, token, counter, temperature), (position, token, counter, None, seed),
        (position, token, counter, temperature.double(), seed),
        (position, token, counter, temperature[:1], seed),
        (position, token, counter, temperature, seed[:2]),
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            sample_token(logits, *wrong)
