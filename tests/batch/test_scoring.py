"""Tests that scores are sums of log_softmax(model(ids).logits), in batches of any size."""

import math
import weakref

import pytest
import torch

from gemma_fast.batch import scoring
from gemma_fast.batch.scoring import token_logprobs

TEXTS = ["hello the world", "the", "in the winner hello hello in the", "hello", "a" * 60]


def logprob(model, ids: list[int], tokens: int) -> float:
    """Returns the log-probability of the last `tokens` ids, from one call of the model."""
    logp = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return float(logp.gather(1, torch.tensor(ids[1:])[:, None])[-tokens:].sum())


@pytest.mark.parametrize("batch_size", [1, 2, 32])
@pytest.mark.parametrize("at_once", [512, 7], ids="logits of {} tokens".format)
def test_score_of_a_text_is_that_of_one_forward_pass(
    answer, model, tokenizer, monkeypatch, batch_size, at_once
):
    monkeypatch.setattr(scoring, "MAX_LOGITS", at_once)
    found = answer([{"text": x, "id": x} for x in TEXTS], score=True, batch_size=batch_size)
    for one, text in zip(found, TEXTS, strict=True):
        ids = tokenizer(text).input_ids
        assert one["id"] == text and one["tokens"] == len(ids) - 1
        assert one["logprob"] == pytest.approx(logprob(model, ids, len(ids) - 1), rel=1e-5)


def test_only_the_completion_is_scored(answer, model, tokenizer):
    rows = [
        {"prompt": "hello the", "completion": " world", "label": 2},
        {"prompt": "hello the ", "completion": "world"},
        {"prompt": "", "completion": "the"},
    ]
    tokens = [len(tokenizer(x).input_ids) for x in ("hello the world", "hello the", "the")]
    expected = [tokens[0] - tokens[1], tokens[0] - tokens[1], tokens[2] - 1]
    found = answer(rows, score=True)
    assert [x["tokens"] for x in found] == expected
    assert found[0]["logprob"] == pytest.approx(found[1]["logprob"])
    assert found[0]["columns"] == {"label": 2}
    for one, row, scored in zip(found, rows, expected, strict=True):
        ids = tokenizer(row["prompt"] + row["completion"]).input_ids
        assert one["logprob"] == pytest.approx(logprob(model, ids, scored), rel=1e-5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": ""}, "there is no token to score"),
        ({"prompt": "a", "completion": ""}, "there is no token to score"),
        ({"prompt": "a"}, "column completion must be text, but there is no such column"),
        ({"text": 5}, "column text must be text, not 5"),
        ({"text": "a", "completion": "b"}, "the column text, or prompt and completion"),
        ({}, "the column text, or prompt and completion"),
        ({"text": "a" * 90}, "a text of 91 tokens does not fit the limit of 80"),
    ],
)
def test_bad_row_is_an_error_and_the_others_are_scored(answer, row, message):
    first, bad, last = answer([{"text": "the"}, row, {"text": "the"}], score=True, max_length=80)
    assert message in bad["error"] and "logprob" not in bad
    assert first["logprob"] == pytest.approx(last["logprob"])


def test_padding_of_a_batch_is_limited(answer, model, monkeypatch):
    sizes = []
    forward = model.hidden_states

    def counting(ids, *args, **kwargs):
        sizes.append(ids.numel())
        return forward(ids, *args, **kwargs)

    monkeypatch.setattr(model, "hidden_states", counting)
    monkeypatch.setattr(scoring, "MAX_TOKENS", 130)
    answer([{"text": "a" * 60} for _ in range(6)] + [{"text": "the"}] * 6, score=True)
    assert max(sizes) <= 130 and len(sizes) == 4


def test_likeliest_tokens_are_greedy():
    logits = torch.tensor([[0.0, 1.0, 3.0], [0.0, 4.0, 3.0]], dtype=torch.bfloat16)
    logp, greedy = token_logprobs(logits, torch.tensor([2, 2]))
    torch.testing.assert_close(logp, logits.float().log_softmax(-1)[:, 2])
    assert greedy.tolist() == [True, False]


def test_batch_that_does_not_fit_in_memory_is_halved(answer, model, monkeypatch):
    forward = model.hidden_states

    def scarce(ids, *args, **kwargs):
        if len(ids) > 2 or ids.shape[1] > 50:
            raise torch.OutOfMemoryError("out of memory: 3 GB")
        return forward(ids, *args, **kwargs)

    rows = [{"text": "hello"}] * 5 + [{"text": "a" * 60}]
    expected = answer(rows, score=True)
    monkeypatch.setattr(model, "hidden_states", scarce)
    found = answer(rows, score=True)
    assert found[5]["error"] == "OutOfMemoryError: out of memory: 3 GB"
    assert [x["logprob"] for x in found[:5]] == pytest.approx([x["logprob"] for x in expected[:5]])


def test_memory_of_a_batch_that_does_not_fit_is_freed_before_its_halves(answer, monkeypatch):
    sums, failed = scoring._sums, []

    def fails(model, tasks, pad_token_id):
        assert all(logits() is None for logits in failed)
        logits = torch.zeros(3)
        if len(tasks) > 1:
            failed.append(weakref.ref(logits))
            raise torch.OutOfMemoryError("no memory for logits")
        return sums(model, tasks, pad_token_id)

    monkeypatch.setattr(scoring, "_sums", fails)
    found = answer([{"text": text} for text in TEXTS], score=True)
    assert len(failed) == len(TEXTS) - 1
    assert all("logprob" in x for x in found)


def test_logprob_that_is_not_finite_is_an_error(answer, monkeypatch):
    monkeypatch.setattr(scoring, "_sums", lambda model, tasks, _: [math.nan] * len(tasks))
    (found,) = answer([{"text": "hello"}], score=True)
    assert "logprob" not in found and "are not finite" in found["error"]
