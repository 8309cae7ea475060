"""Sampling against transformers' logits processors, and its ranges."""

import math

import pytest
import torch
from transformers.generation import logits_process as hf

from gemma_fast.sampling import Sampling


def logits(batch: int = 4, vocab: int = 50) -> torch.Tensor:
    return 3 * torch.randn(batch, vocab, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"temperature": 0.7}, [hf.TemperatureLogitsWarper(0.7)]),
        ({"top_k": 5}, [hf.TopKLogitsWarper(5)]),
        ({"top_k": 500}, []),
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
    torch.testing.assert_close(Sampling(do_sample=True, **ours).filtered(logits()), expected)


def test_repetition_penalty_equals_transformers():
    for given in (logits(), logits() - 20):  # positive and negative at the top
        seen = given.topk(3).indices
        expected = hf.RepetitionPenaltyLogitsProcessor(1.8)(seen, given.clone()).argmax(-1)
        assert (expected != seen[:, 0]).any()
        assert torch.equal(Sampling(repetition_penalty=1.8)(given, seen), expected)


def test_the_penalty_is_not_rounded_to_bf16():
    """10 / 1.004 is 9.96, above 9.9375; in bf16 the two would be one."""
    close = torch.tensor([[9.9375, 10.0]]).bfloat16()
    assert Sampling(repetition_penalty=1.004)(close, torch.tensor([[1]])) == 1


def test_top_p_keeps_no_more_than_it_needs():
    """Half the probability is what the first token has: the second is not needed."""
    halves = torch.tensor([[2.0, 1.0, 0.0, 0.0]]) * math.log(2)  # 1/2, 1/4, 1/8, 1/8
    kept = Sampling(do_sample=True, top_p=0.5).filtered(halves).isfinite()
    assert kept.tolist() == [[True, False, False, False]]


def test_greedy_ignores_the_filters():
    greedy = Sampling(temperature=9.0, top_k=3)(logits(), torch.zeros(4, 1, dtype=torch.long))
    assert torch.equal(greedy, logits().argmax(-1))


def test_draws_follow_the_probabilities():
    sampling = Sampling(do_sample=True, temperature=2.0, top_k=4)
    rows = logits(1, 10).expand(20_000, -1)
    generator = torch.Generator().manual_seed(0)
    drawn = sampling(rows, torch.zeros(20_000, 1, dtype=torch.long), generator)
    expected = sampling.filtered(rows[:1]).softmax(-1)[0]
    frequency = torch.bincount(drawn, minlength=10) / 20_000
    torch.testing.assert_close(frequency, expected, atol=0.015, rtol=0)
    assert frequency[expected == 0].sum() == 0


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
