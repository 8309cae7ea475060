"""Compares sample_token and next_token with their references, and tests their random noise."""

import pytest
import torch
import triton
import triton.language as tl
from kernel_checks import DTYPES
from marks import slow
from triton_interpreter import interpreter

from gemma_fast.kernels import sample
from gemma_fast.kernels.lm_head import next_token
from gemma_fast.kernels.sample import gumbel, gumbel_reference, philox_reference, sample_token

INF, NAN = float("inf"), float("nan")


def sampled(temperature=0.7, seed=(5 << 40) + 77, device="cpu"):
    """Returns temperature :: [1] and seed :: [1]. `chosen` expands them to all rows."""
    return torch.full((1,), temperature, device=device), torch.tensor([seed], device=device)


def chosen(op, *given, b, device, position=None, **options):
    """Returns the tokens that an op samples. `given` are the op's arguments before `position`."""
    for name in {"temperature", "seed"} & options.keys():
        if options[name] is not None:
            options[name] = options[name].expand(b).contiguous()
    token = torch.full((b,), -7, device=device)
    counter = torch.zeros(b + 1, dtype=torch.int32, device=device)
    if position is None:
        position = torch.arange(3, 3 + b, dtype=torch.int32, device=device)
    op(*given, position, token, counter, **options)
    assert not counter.any(), "the kernel did not reset its counter"
    return token


def choose_from(logits, temperature=None, seed=None, position=None):
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
    seed, position = torch.tensor([(3 << 32) + 1]), torch.tensor([9, 11], dtype=torch.int32)
    noise = gumbel_reference(seed, position, 11)
    for row, v in ((0, 0), (0, 10), (1, 3), (1, 4)):
        counter = (v // 4, int(position[row]), row, 0)
        drawn = philox_reference(tuple(torch.tensor([c]) for c in counter), seed)[v % 4]
        u = (drawn.double() + 0.5) / 2**32
        torch.testing.assert_close(noise[row, v], -(-torch.log1p(-u)).log().float().squeeze())


with interpreter():  # the interpreter runs only kernels that are defined in this context

    @triton.jit
    def _noise_kernel(token_ptr, noise_ptr, seed, TOKENS: tl.constexpr):
        place, zero = tl.arange(0, TOKENS)[:, None], tl.zeros([1, 1], tl.int32)
        tl.store(noise_ptr + place, gumbel(seed, zero, zero, tl.load(token_ptr + place)))


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
    torch.testing.assert_close(noise.cpu().double(), expected, rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("drawn", [0, 2**32 - 1], ids=["smallest", "largest"])
def test_noise_of_extreme_random_numbers_is_finite(drawn, monkeypatch):
    monkeypatch.setattr(sample, "philox_reference", lambda *_: 4 * (torch.full((1, 2), drawn),))
    assert gumbel_reference(torch.tensor([1]), torch.tensor([0]), 8).isfinite().all()


def test_noise_has_the_gumbel_distribution_in_its_tails_too():
    noise = gumbel_reference(torch.tensor([1]), torch.zeros(8, dtype=torch.int32), 262_144)
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
        expected = choose_from(logits, *options)
        assert (expected % 3 != 0).all()
        with interpreter():
            device = "cuda" if torch.cuda.is_available() else "cpu"
            given = [x.to(device) for x in (logits, *options)]
            assert torch.equal(choose_from(*given).cpu(), expected)


@pytest.mark.parametrize("temperature", [None, 1.0], ids=["greedy", "sampled"])
def test_non_finite_logits_give_token_minus_one(temperature, device):
    logits = torch.randn(5, 2100, device=device)
    logits[0, 1500], logits[1, 3], logits[2] = NAN, INF, -INF
    logits[3, 1:] = -INF
    options = () if temperature is None else sampled(temperature, device=device)
    token = choose_from(logits, *options).tolist()
    assert token[:4] == [-1, -1, -1, 0] and token[4] >= 0


def test_equal_logits_give_the_lowest_id(device, monkeypatch):
    monkeypatch.setattr(sample, "PARTIALS", 1)  # CHUNK = 4, less than the 5 programs
    logits = torch.zeros(3, 5000, device=device)
    logits[1, [1023, 1024, 4999]] = 1.0
    logits[2, [3500, 4999]], logits[2, 7] = 1.0, -0.0
    assert choose_from(logits).tolist() == [0, 1023, 3500]


def test_sampled_tokens_follow_the_probabilities():
    """Chi-square with 7 degrees of freedom exceeds 24.3 one time in a thousand."""
    logits, draws = torch.randn(1, 8), 40_000
    position = torch.full((draws,), 12, dtype=torch.int32)
    token = choose_from(logits.expand(draws, -1), *sampled(1.5), position)
    due = draws * (logits[0].double() / 1.5).softmax(-1)
    assert ((token.bincount(minlength=8) - due).square() / due).sum() < 24.3


def test_noise_depends_on_seed_row_and_position(device):
    logits = torch.zeros(6, 500, device=device)
    position = torch.tensor([0, 1, 2, 3, 3, 3], dtype=torch.int32, device=device)
    first = choose_from(logits, *sampled(device=device), position)
    assert torch.equal(choose_from(logits, *sampled(device=device), position), first)
    assert len(set(first.tolist())) >= 5
    for other in (1, 77, (4 << 40) + 77):  # the default seed of `sampled` is (5 << 40) + 77
        again = choose_from(logits, *sampled(seed=other, device=device), position)
        assert (again != first).sum() >= 5


@pytest.mark.parametrize("b", [1, 3, 9], ids="b {}".format)
def test_each_row_uses_its_own_temperature_and_seed(b, device):
    """A row gets the same token as in a batch in which all rows have the settings of this row."""
    given = [x.to(device) for x in inputs(b, 64, 500)]
    logits = exact_logits(*given).float()
    settings = [((0.0, 30.0, 9.0)[i % 3], 7 + i) for i in range(b)]
    temperature = torch.tensor([t for t, _ in settings], device=device)
    seed = torch.tensor([s for _, s in settings], device=device)
    mixed = {"b": b, "device": device, "temperature": temperature, "seed": seed}
    for op, args in ((sample_token, [logits]), (next_token, given)):
        found = chosen(op, *args, **mixed)
        for row, (t, s) in enumerate(settings):
            options = dict(zip(("temperature", "seed"), sampled(t, s, device), strict=True))
            alone = chosen(op, *args, b=b, device=device, **(options if t else {}))
            assert found[row] == alone[row]


def inputs(b, dim, vocab, dtype=torch.float32, residual=True, post_norm=True):
    x, hidden = torch.randn(2, b, dim).to(dtype)
    norm, post = 0.3 * torch.randn(2, dim).to(dtype)
    weight = torch.randn(vocab, dim).to(dtype)
    return [x, hidden if residual else None, norm, post if post_norm else None, weight]


def exact_logits(x, residual, norm_weight, post_norm_weight, weight, softcap=None):
    def norm(x, weight):
        x = x.double()
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + weight.double())

    h = x.double() if post_norm_weight is None else norm(x, post_norm_weight)
    h = h if residual is None else h + residual.double()
    logits = norm(h, norm_weight) @ weight.double().T
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


CASES = [
    # b, dim, vocab, residual, post-norm, softcap
    (1, 64, 199, True, False, None),
    (1, 640, 200, True, True, None),
    (3, 72, 199, True, True, 30.0),
    (8, 64, 1000, False, False, 5.0),
    (8, 72, 2083, True, False, 30.0),
    (9, 64, 1000, True, True, 5.0),  # more than MAX_ROWS rows take several launches
]


def on_kernels(given, b, softcap, options):
    with interpreter():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        given = [None if x is None else x.to(device) for x in given]
        options = {name: x.to(device) for name, x in options.items()}
        return chosen(next_token, *given, b=b, device=device, softcap=softcap, **options).cpu()


@pytest.mark.parametrize(("b", "dim", "vocab", "residual", "post_norm", "softcap"), CASES, ids=str)
def test_next_token_equals_reference(b, dim, vocab, residual, post_norm, softcap, poison_outputs):
    given = inputs(b, dim, vocab, residual=residual, post_norm=post_norm)
    found = []
    for options in ({}, dict(zip(("temperature", "seed"), sampled(30.0), strict=True))):
        expected = chosen(next_token, *given, b=b, device="cpu", softcap=softcap, **options)
        assert torch.equal(on_kernels(given, b, softcap, options), expected)
        found.append(expected)
    assert torch.equal(found[0], exact_logits(*given).argmax(-1))
    assert not torch.equal(*found)


@pytest.mark.parametrize("b", [1, 8], ids="b {}".format)
def test_next_token_equals_reference_with_all_options(b):
    """Logits are around 1, where a wrong slope of the soft cap would change tokens."""
    given, drawn = inputs(b, 512, 64), set()
    given[-1] /= 512**0.5
    for seed in range(8):
        options = dict(zip(("temperature", "seed"), sampled(0.3, seed), strict=True))
        expected = chosen(next_token, *given, b=b, device="cpu", softcap=5.0, **options)
        assert torch.equal(on_kernels(given, b, 5.0, options), expected)
        drawn.add(int(expected[0]))
    assert len(drawn) > 1


@pytest.mark.parametrize("b", [1, 8], ids="b {}".format)
@pytest.mark.parametrize("same", [(1, 5, 37), (9, 21)], ids=["one program", "two programs"])
def test_equal_rows_of_the_weight_give_the_lowest_id(same, b, device):
    """For b = 1, a program computes the logits of 16 tokens, four at a time. The same program
    computes ids 1 and 5. Different programs compute ids 9 and 21."""
    x, norm, weight = (torch.zeros(n, 2048, device=device) for n in (b, 1, 40))
    x[:, 3], weight[same, 3] = 2.0, 1.0
    token = chosen(next_token, x, None, norm[0], None, weight, b=b, device=device)
    assert (token == same[0]).all()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("b", [1, 8, 9], ids="b {}".format)
def test_next_token_in_16_bits_has_almost_the_highest_logit(b, dtype, device):
    """Rounding the normalized input may swap tokens whose exact logits are almost equal."""
    given = inputs(b, 128, 500, dtype)
    theirs = [x.to(device) for x in given]
    token = chosen(next_token, *theirs, b=b, device=device).cpu()
    exact = exact_logits(*given)
    lost = exact.max(-1).values - exact.gather(1, token[:, None]).squeeze(1)
    assert (lost <= 4 * torch.finfo(dtype).eps * exact.abs().max()).all()


def test_the_soft_cap_applies_before_sampling(device):
    """With a cap of 1, half of the tokens are about equally likely, so equal rows sample different
    tokens. With a cap of 100, equal rows sample one or two tokens."""
    given = [x.to(device) for x in inputs(1, 64, 500)]
    given[:2] = (x.expand(8, -1) for x in given[:2])
    given[-1] *= 0.5
    temperature, seed = sampled(0.3, device=device)
    for softcap, different in ((1.0, (7, 8)), (100.0, (1, 2))):
        token = chosen(
            next_token, *given, b=8, device=device, temperature=temperature, seed=seed,
            softcap=softcap,
        )  # fmt: skip
        assert len(set(token.tolist())) in different


@pytest.mark.parametrize("b", [1, 3, 9], ids="b {}".format)
@pytest.mark.parametrize("softcap", [*slow(None), 5.0], ids=str)
def test_non_finite_hiddens_or_weights_give_token_minus_one(b, softcap, device):
    x, residual, norm, post, weight = (t.to(device) for t in inputs(b, 64, 50))
    x[-1, 5] = NAN
    for options in ({}, dict(zip(("temperature", "seed"), sampled(device=device), strict=True))):
        token = chosen(
            next_token, x, residual, norm, post, weight, b=b, device=device, softcap=softcap,
            **options,
        )  # fmt: skip
        assert token[-1] == -1 and (token[:-1] >= 0).all()
    weight[7] = INF  # the soft cap must not make an infinite logit finite
    norm.fill_(0)
    x[-1, 5] = 0.0
    x.abs_(), residual.abs_()
    token = chosen(
        next_token, x, residual, norm, post.fill_(0), weight, b=b, device=device, softcap=softcap
    )
    assert (token == -1).all()


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
