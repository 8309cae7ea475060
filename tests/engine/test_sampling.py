"""Compares sampling with transformers' logits processors, and tests that invalid settings raise."""

import math
from dataclasses import replace

import pytest
import torch
from transformers.generation import logits_process as hf

from gemma_fast.engine.sampler import Sampler
from gemma_fast.engine.sampling import Sampling
from gemma_fast.kernels.sample import sample_token


def logits(batch: int = 4, vocab: int = 50) -> torch.Tensor:
    return 3 * torch.randn(batch, vocab, generator=torch.Generator().manual_seed(0))


def sampler_of(sampling: Sampling, batch: int, vocab: int, seen=None) -> Sampler:
    """Returns a sampler with these settings and seed 1 in all rows. `seen` :: [b, n] contains the
    tokens so far, for the repetition penalty."""
    sampler = Sampler(batch, vocab, "cpu")
    sampler.set([replace(sampling, seed=1)] * batch)
    if seen is not None:
        sampler.read(seen)
    return sampler


def processed(sampling: Sampling, logits: torch.Tensor, seen=None) -> torch.Tensor:
    return sampler_of(sampling, *logits.shape, seen).process(logits)


def choose(sampling: Sampling, logits: torch.Tensor, seen=None, position=None) -> torch.Tensor:
    """Samples tokens from logits as Gemma.step does."""
    b = len(logits)
    if position is None:
        position = torch.zeros(b, dtype=torch.int32)
    sampler, counter = sampler_of(sampling, *logits.shape, seen), torch.zeros(b, dtype=torch.int32)
    if sampler.process:
        logits = sampler.process(logits)
    sample_token(logits, position, sampler.token, counter, sampler.temperature, sampler.seed)
    return sampler.token


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"temperature": 0.7, "top_k": 50}, [hf.TemperatureLogitsWarper(0.7)]),
        ({"top_k": 5}, [hf.TopKLogitsWarper(5)]),
        ({"top_k": 500}, []),
        ({"top_k": 10**30}, []),
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
    torch.testing.assert_close(processed(Sampling(do_sample=True, **ours), logits()), expected)


def test_each_row_uses_its_own_settings():
    rows = [
        Sampling(do_sample=True, top_k=5), Sampling(do_sample=True, top_p=0.6, temperature=1.7),
        Sampling(do_sample=True, min_p=0.2), Sampling(top_k=3), Sampling(do_sample=True),
        Sampling(do_sample=True, repetition_penalty=1.8, top_k=9),
    ]  # fmt: skip
    given, seen = logits(len(rows)), torch.arange(12).view(6, 2)
    sampler = Sampler(*given.shape, "cpu")
    sampler.set(rows)
    sampler.read(seen)
    found = sampler.process(given)
    for row, sampling in enumerate(rows):
        alone = sampler_of(sampling, 1, 50, seen[row : row + 1])
        one = given[row : row + 1]
        expected = alone.process(one) if alone.process else one
        if sampling.do_sample:
            torch.testing.assert_close(found[row : row + 1], expected, rtol=0, atol=0)
        assert torch.equal(found[row].argmax(), expected.argmax())
    assert sampler.temperature.tolist() == [1, 1, 1, 0, 1, 1]


def test_filters_keep_all_tokens_that_tie_with_the_last_kept_token():
    """transformers' top-k also keeps all tied tokens, but its top-p keeps an arbitrary one."""
    given = torch.tensor([[3.0, 1.0, 1.0, 0.0, 1.0]]).bfloat16()
    for filters in ({"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 3, "top_p": 0.9}):
        kept = processed(Sampling(do_sample=True, **filters), given).isfinite()
        assert kept.tolist() == [[True, True, True, False, True]]
    expected = hf.TopKLogitsWarper(2)(None, given)
    assert torch.equal(processed(Sampling(do_sample=True, top_k=2), given), expected)


def test_repetition_penalty_equals_transformers():
    for given in (logits(), logits() - 20):  # the top logits are positive, then negative
        ids = given.topk(3).indices
        sampling = Sampling(repetition_penalty=1.8)
        expected = hf.RepetitionPenaltyLogitsProcessor(1.8)(ids, given.clone())
        torch.testing.assert_close(processed(sampling, given, ids), expected)
        assert (expected.argmax(-1) != ids[:, 0]).any()
        assert torch.equal(choose(sampling, given, ids), expected.argmax(-1))


def test_the_penalty_is_not_rounded_to_bf16():
    """10 / 1.004 = 9.96 is more than 9.9375, but rounded to bf16 both would be equal."""
    close = torch.tensor([[9.9375, 10.0]]).bfloat16()
    assert choose(Sampling(repetition_penalty=1.004), close, torch.tensor([[1]])) == 1


def test_top_p_keeps_no_more_tokens_than_needed():
    """The first token alone has probability 0.5 = top_p, so the second token must not be kept."""
    halves = torch.tensor([[2.0, 1.0, 0.0, 0.0]]) * math.log(2)  # 1/2, 1/4, 1/8, 1/8
    kept = processed(Sampling(do_sample=True, top_p=0.5), halves).isfinite()
    assert kept.tolist() == [[True, False, False, False]]


def test_greedy_ignores_the_filters():
    greedy = Sampling(temperature=9.0, top_k=3)
    assert torch.equal(choose(greedy, logits()), logits().argmax(-1))


def test_sampled_tokens_follow_the_probabilities():
    """Chi-square with 3 degrees of freedom exceeds 16.3 one time in a thousand."""
    sampling, draws = Sampling(do_sample=True, temperature=2.0, top_k=4), 20_000
    position = torch.arange(draws, dtype=torch.int32)
    drawn = choose(sampling, logits(1, 10).expand(draws, -1), position=position)
    expected = draws * processed(sampling, logits(1, 10)).softmax(-1)[0]
    found, kept = drawn.bincount(minlength=10), expected > 0
    assert kept.sum() == 4 and found[~kept].sum() == 0
    assert ((found - expected).square() / expected)[kept].sum() < 16.3


@pytest.mark.parametrize(
    "filters",
    [{}, {"do_sample": False}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5},
     {"top_k": 3, "top_p": 0.5, "min_p": 0.5, "repetition_penalty": 2.0}],
    ids=str,
)  # fmt: skip
def test_non_finite_logits_give_token_minus_one(filters):
    given = logits(5)
    given[0, 3], given[1, 2], given[2] = float("nan"), float("inf"), float("-inf")
    given[3, 1:] = float("-inf")
    seen = torch.arange(50).expand(5, -1)
    token = choose(Sampling(**{"do_sample": True, **filters}), given, seen).tolist()
    assert token[:4] == [-1, -1, -1, 0] and token[4] >= 0


def test_logits_are_processed_only_if_filtered_or_penalised():
    def processes(**options) -> bool:
        return sampler_of(Sampling(**options), 2, 9).process is not None

    for options in ({}, {"do_sample": True, "temperature": 2.0}, {"top_k": 3, "top_p": 0.5}):
        assert not processes(**options)
    for options in ({"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}):
        assert processes(do_sample=True, **options)
    for do_sample in (False, True):
        assert processes(do_sample=do_sample, repetition_penalty=1.1)


def test_graph_key_depends_on_the_operations_of_a_step():
    """The key depends on the number of sorted logits, rounded up to 64, 128, …, and on whether rows
    sample or penalise."""

    def key(**options):
        return sampler_of(Sampling(**options), 2, 200).graph_key

    assert key(temperature=2.0, top_k=5) == key()
    keys = [
        key(), key(repetition_penalty=1.1), key(do_sample=True), key(do_sample=True, top_k=64),
        key(do_sample=True, top_k=65), key(do_sample=True, top_p=0.9),
        key(do_sample=True, top_k=5, repetition_penalty=1.1),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    for other in ({"temperature": 2.0}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 6}):
        assert key(**{"do_sample": True, "top_k": 5, **other}) == key(do_sample=True, top_k=5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 1e-7), ("temperature", 1e-320), ("temperature", -1),
        ("temperature", float("nan")), ("temperature", "hot"), ("top_k", -1), ("top_k", 2.5),
        ("top_k", True), ("temperature", float("inf")), ("repetition_penalty", float("inf")),
        ("top_k", 50.0), ("top_k", float("inf")), ("top_p", -0.1), ("top_p", 1.1), ("min_p", -0.1),
        ("min_p", 2), ("repetition_penalty", 0), ("do_sample", "yes"),
    ],
)  # fmt: skip
def test_invalid_settings_raise(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}.* must be"):
        Sampling(**{"do_sample": True, name: value})
