"""Compares next_token with its reference. One test compares it with sample_token."""

import pytest
import torch
from kernel_checks import DTYPES, chosen, sampled
from marks import slow
from tolerances import rounding_error
from triton_interpreter import interpreter

from gemma_fast.kernels.lm_head import next_token
from gemma_fast.kernels.sample import sample_token

INF, NAN = float("inf"), float("nan")


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


def exact_logits(
    x, residual, norm_weight, post_norm_weight, weight, softcap=None, layer_scalar=1.0, offset=1.0
):
    def norm(x, weight):
        x = x.double()
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (offset + weight.double())

    h = x.double() if post_norm_weight is None else norm(x, post_norm_weight)
    h = h if residual is None else h + residual.double()
    logits = norm(h * float(layer_scalar), norm_weight) @ weight.double().T
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


@pytest.mark.parametrize("b", [1, 3, 9], ids="b {}".format)
@pytest.mark.parametrize("offset", [0.0, 1.0], ids="offset {}".format)
def test_norm_offset_and_layer_scalar(offset, b, device):
    """A negative scalar changes the order of the logits. A positive one would not, because the
    norm divides by it."""
    given, scalar = inputs(b, 640, 500), torch.tensor([-0.5])
    theirs = [x.to(device) for x in given]
    options = {"offset": offset, "layer_scalar": scalar.to(device)}
    token = chosen(next_token, *theirs, b=b, device=device, **options).cpu()
    assert torch.equal(token, exact_logits(*given, layer_scalar=scalar, offset=offset).argmax(-1))
    for wrong in ({"offset": 1 - offset}, {"layer_scalar": -scalar}):
        options = {"offset": offset, "layer_scalar": scalar} | wrong
        assert not torch.equal(token, exact_logits(*given, **options).argmax(-1))


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
    """The post-norm, its sum with the residual and the norm are rounded. This may swap tokens whose
    exact logits are almost equal."""
    given = inputs(b, 128, 500, dtype)
    theirs = [x.to(device) for x in given]
    token = chosen(next_token, *theirs, b=b, device=device).cpu()
    exact = exact_logits(*given)
    lost = exact.max(-1).values - exact.gather(1, token[:, None]).squeeze(1)
    assert (lost <= 2 * rounding_error(3, dtype) * exact.square().mean().sqrt()).all()


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
