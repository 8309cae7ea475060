"""Sampling against transformers' logits processors, and its ranges."""

import math

import pytest
import torch
from transformers.generation import logits_process as hf

from gemma_fast.engine.sampling import Sampling


def logits(batch: int = 4, vocab: int = 50) -> torch.Tensor:
    return 3 * torch.randn(batch, vocab, generator=torch.Generator().manual_seed(0))


def choose(sampling: Sampling, logits: torch.Tensor, seen=None, position=None) -> torch.Tensor:
    b = len(logits)
    if position is None:
        position = torch.zeros(b, dtype=torch.int32)
    token, arrived = torch.zeros(b, dtype=torch.int64), torch.zeros(b, dtype=torch.int32)
    temperature, seed = torch.full((1,), sampling.temperature), torch.tensor([1])
    sampling.choose(logits, seen, position, token, arrived, temperature, seed)
    return token


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"temperature": 0.7}, [hf.TemperatureLogitsWarper(0.7)]),
        ({"top_k": 5}, [hf.TopKLogitsWarper(5)]),
        ({"top_k": 500}, []),
        ({"top_k": 500, "top_p": 0.6}, [hf.TopPLogitsWarper(0.6)]),
        ({"top_k": 7, "top_p": 0.9}, [hf.TopKLogitsWarper(7), hf.TopPLogitsWarper(0.9)]),
        ({"top_k": 7, "min_p": 0.1}, [hf.TopKLogitsWarper(7), hf.MinPLogitsWarper(0.1)]),
        ({"top_p": 0.95, "min_p": 0.1}, [hf.TopPLogitsWarper(0.95), hf.MinPLogitsWarper(0.1)]),
        ({"top_p": 0.6}, [hf.TopPLogitsWarper(0.6)]),
        ({"top_p": 1e-9}, [hf.TopPLogitsWarper(1e-9)]),
        ({"min_p": 0.2}, [hf.MinPLogitsWarper(0.2)]),
        ({"min_p": 1.0}, [hf.MinPLogitsWarper(1.0)]),
        (
            {"temperature": 1.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
            [
                hf.TemperatureLogitsWarper(1.7),
                hf.TopKLogitsWarper(20),
                hf.TopPLogitsWarper(0.8),
                hf.MinPLogitsWarper(0.05),
            ],
        ),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_filters_equal_transformers(ours, theirs):
    expected = logits()
    for process in theirs:
        expected = process(None, expected)
    sampling = Sampling(do_sample=True, **ours)
    for temperature in (sampling.temperature, torch.full((1,), sampling.temperature)):
        torch.testing.assert_close(sampling.filtered(logits(), temperature), expected)


def test_filters_keep_what_is_as_likely_as_the_last():
    """As transformers' top-k does; its top-p keeps any of equal tokens."""
    given = torch.tensor([[3.0, 1.0, 1.0, 0.0, 1.0]]).bfloat16()
    for filters in ({"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 3, "top_p": 0.9}):
        kept = Sampling(do_sample=True, **filters).filtered(given, 1.0).isfinite()
        assert kept.tolist() == [[True, True, True, False, True]]
    expected = hf.TopKLogitsWarper(2)(None, given)
    assert torch.equal(Sampling(do_sample=True, top_k=2).filtered(given, 1.0), expected)


def test_repetition_penalty_equals_transformers():
    for given in (logits(), logits() - 20):  # positive and negative at the top
        ids = given.topk(3).indices
        seen = torch.zeros_like(given, dtype=torch.bool).scatter_(1, ids, True)
        sampling = Sampling(repetition_penalty=1.8)
        expected = hf.RepetitionPenaltyLogitsProcessor(1.8)(ids, given.clone())
        torch.testing.assert_close(sampling.penalised(given, seen), expected)
        assert (expected.argmax(-1) != ids[:, 0]).any()
        assert torch.equal(choose(sampling, given, seen), expected.argmax(-1))


def test_the_penalty_is_not_rounded_to_bf16():
    """10 / 1.004 is 9.96, above 9.9375; in bf16 the two would be one."""
    close = torch.tensor([[9.9375, 10.0]]).bfloat16()
    seen = torch.tensor([[False, True]])
    assert choose(Sampling(repetition_penalty=1.004), close, seen) == 1


def test_top_p_keeps_no_more_than_it_needs():
    """Half the probability is what the first token has: the second is not needed."""
    halves = torch.tensor([[2.0, 1.0, 0.0, 0.0]]) * math.log(2)  # 1/2, 1/4, 1/8, 1/8
    kept = Sampling(do_sample=True, top_p=0.5).filtered(halves, 1.0).isfinite()
    assert kept.tolist() == [[True, False, False, False]]


def test_greedy_ignores_the_filters():
    greedy = Sampling(temperature=9.0, top_k=3)
    assert torch.equal(choose(greedy, logits()), logits().argmax(-1))


def test_draws_follow_the_probabilities():
    """Chi-square with 3 degrees of freedom: above 16.3 one time in a thousand."""
    sampling, draws = Sampling(do_sample=True, temperature=2.0, top_k=4), 20_000
    position = torch.arange(draws, dtype=torch.int32)
    drawn = choose(sampling, logits(1, 10).expand(draws, -1), position=position)
    expected = draws * sampling.filtered(logits(1, 10), 2.0).softmax(-1)[0]
    found, kept = drawn.bincount(minlength=10), expected > 0
    assert kept.sum() == 4 and found[~kept].sum() == 0
    assert ((found - expected).square() / expected)[kept].sum() < 16.3


@pytest.mark.parametrize(
    "filters",
    [{}, {"do_sample": False}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5},
     {"top_k": 3, "top_p": 0.5, "min_p": 0.5, "repetition_penalty": 2.0}],
    ids=str,
)  # fmt: skip
def test_logits_that_are_not_finite(filters):
    given = logits(5)
    given[0, 3], given[1, 2], given[2] = float("nan"), float("inf"), float("-inf")
    given[3, 1:] = float("-inf")
    seen = torch.ones_like(given, dtype=torch.bool)
    token = choose(Sampling(**{"do_sample": True, **filters}), given, seen).tolist()
    assert token[:4] == [-1, -1, -1, 0] and token[4] >= 0


def test_when_logits_are_needed():
    for options in ({}, {"do_sample": True, "temperature": 2.0}, {"top_k": 3, "top_p": 0.5}):
        assert not Sampling(**options).needs_logits
    for options in ({"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}):
        assert Sampling(do_sample=True, **options).needs_logits
    for do_sample in (False, True):
        assert Sampling(do_sample=do_sample, repetition_penalty=1.1).needs_logits


def test_what_a_graph_depends_on():
    greedy = Sampling().graph_key
    assert Sampling(temperature=2.0, top_k=5).graph_key == greedy
    assert Sampling(repetition_penalty=1.1).graph_key != greedy
    drawn = Sampling(do_sample=True, top_k=5)
    assert Sampling(do_sample=True, top_k=5, temperature=2.0).graph_key == drawn.graph_key
    for other in ({"top_k": 6}, {"top_p": 0.9}, {"min_p": 0.1}, {"repetition_penalty": 1.1}):
        key = Sampling(**{"do_sample": True, "top_k": 5, **other}).graph_key
        assert key not in (greedy, drawn.graph_key)
        assert hash(key) is not None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0), ("temperature", 1e-320), ("temperature", -1),
        ("temperature", float("nan")), ("temperature", "hot"), ("top_k", -1), ("top_k", 2.5),
        ("top_k", True), ("temperature", float("inf")), ("repetition_penalty", float("inf")),
        ("top_k", 50.0), ("top_k", float("inf")), ("top_p", 0), ("top_p", 1.1), ("min_p", -0.1),
        ("min_p", 2), ("repetition_penalty", 0), ("do_sample", "yes"),
    ],
)  # fmt: skip
def test_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}.* must be"):
        Sampling(**{name: value})
