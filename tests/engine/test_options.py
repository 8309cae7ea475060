"""Compares each option of generate() that changes logits or ends texts with transformers."""

import itertools

import pytest
import torch
import transformers
from decoder_checks import NEVER
from tiny_models import CONFIGS, TOLERANCE, close, left_padded, random_model

from gemma_fast.engine.bias import Bias
from gemma_fast.engine.decoder import Decoder
from gemma_fast.engine.sampling import Sampling

NEW = 14


def both(twins, ids, mask=None, *, eos=None, **options):
    """Returns the greedy texts of transformers and of this project's model."""
    shared = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    theirs = twins.hf.generate(ids, eos_token_id=eos, **shared, **options)
    return theirs, twins.model.generate(ids, eos_token_id=eos or [], **shared, **options)


@pytest.fixture(scope="module")
def batch(twins):
    """Returns ids and mask of three prompts with left padding, and their unrestricted text."""
    _, ids, mask = left_padded(twins, [9, 4, 12])
    options = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
    return ids, mask, twins.model.generate(ids, **options, **NEVER)


def options_of(free) -> dict[str, dict]:
    """Returns options that exclude or favor tokens of the unrestricted texts `free`."""
    new = free[:, -NEW:].tolist()
    first, pair, triple = new[0][0], new[1][1:3], new[2][4:7]
    eos = [new[0][2], new[1][3]]
    return {
        "suppress_tokens": {"suppress_tokens": {first, *pair, 5000, -1}},
        "begin_suppress_tokens": {"begin_suppress_tokens": [row[0] for row in new]},
        "bad_words_ids": {"bad_words_ids": [[first], pair, triple, [eos[0]]], "eos": eos},
        "sequence_bias": {"sequence_bias": [[[first], -9.0], [pair, 4.0], [triple, -float("inf")]]},
        "sequence_bias and penalty": {
            "sequence_bias": {(first,): 9.0, (7,): 9.0}, "repetition_penalty": 1.5,
        },
        "min_new_tokens": {"min_new_tokens": 6, "eos": eos},
        "min_length": {"min_length": 17, "eos": eos},
        "min_new_tokens before min_length": {"min_new_tokens": 2, "min_length": 26, "eos": eos},
        "no_repeat_ngram_size 1": {"no_repeat_ngram_size": 1},
        "no_repeat_ngram_size 2": {"no_repeat_ngram_size": 2, "repetition_penalty": 0.7},
        "no_repeat_ngram_size 3": {"no_repeat_ngram_size": 3, "repetition_penalty": 0.5},
        "all": {
            "suppress_tokens": [first], "bad_words_ids": [pair], "no_repeat_ngram_size": 2,
            "repetition_penalty": 1.3, "min_new_tokens": 5, "begin_suppress_tokens": [9],
            "eos": eos,
        },
    }  # fmt: skip


@pytest.mark.parametrize("name", list(options_of(torch.arange(99).view(3, 33))))
def test_greedy_text_equals_transformers(twins, batch, name):
    ids, mask, free = batch
    expected, found = both(twins, ids, mask, **options_of(free)[name])
    assert torch.equal(found, expected)
    assert not torch.equal(found, free)


@pytest.fixture
def fresh_graphs(twins, graphs):
    """The fixture graphs, for a model that keeps no decoder of another test, or for another."""
    twins.model.free_memory()
    yield graphs
    twins.model.free_memory()


def test_a_graph_reads_the_biases_of_each_step(twins, batch, fresh_graphs):
    """Biases are computed between replays of a CUDA graph, in tensors that the graph reads."""
    ids, mask, free = batch
    every = options_of(free)["all"]
    expected, found = both(twins, ids, mask, **every)
    assert torch.equal(found, expected) and fresh_graphs[-1].replays > 3
    expected, found = both(twins, ids, mask, **every | {"suppress_tokens": [11]})
    assert torch.equal(found, expected) and len(fresh_graphs) == 1


def test_each_row_has_its_own_biases(twins, batch):
    """Rows that share a step get the tokens that they get alone."""
    ids, _, _ = batch
    rows = [
        Sampling(biases=(Bias((5,), 50.0, until=2), Bias((5, 9), 90.0))),
        Sampling(no_repeat_ngram_size=1),
        Sampling(),
    ]

    def written(texts):
        decoder, tokens = Decoder(twins.model, 3, 40), []
        decoder.prefill(ids, None, texts)
        for _ in range(6):
            tokens.append(decoder.token.clone())
            decoder.step()
        return torch.stack(tokens, dim=1)

    mixed = written(rows)
    assert mixed[0, :4].tolist() == [5, 9, *mixed[0, 2:4].tolist()]
    for row, text in enumerate(rows):
        assert torch.equal(mixed[row], written([text] * 3)[row])


def test_the_repetition_penalty_skips_padding(twins):
    """In transformers 5.24, the id of padding is not penalized because it is in the prompt."""
    _, ids, mask = left_padded(twins, [9, 4, 12])
    bias = {"sequence_bias": [[[0], 30.0]], "repetition_penalty": 5.0}
    expected, found = both(twins, ids, mask, **bias)
    assert torch.equal(found, expected) and (found[:, 12] == 0).all()


@pytest.mark.parametrize("pad", [0, 7])
def test_padding_is_found_without_a_mask_as_in_transformers(twins, batch, pad):
    ids, mask, free = batch
    ids = ids.where(mask.bool(), pad)
    options = {"max_new_tokens": NEW, "pad_token_id": pad, "do_sample": False}
    assert (ids != pad).long().equal(mask)
    expected = twins.hf.generate(ids, eos_token_id=None, **options)
    found = twins.model.generate(ids, **options, **NEVER)
    assert torch.equal(found, expected) and torch.equal(found[:, 12:], free[:, 12:])
    # A padding id that also ends texts is not taken for padding.
    expected = twins.hf.generate(ids, eos_token_id=[pad, 1], **options)
    assert torch.equal(twins.model.generate(ids, eos_token_id=[pad, 1], **options), expected)
    with pytest.raises(ValueError, match=f"pad_token_id={pad} after other tokens: pad prompts on"):
        twins.model.generate(torch.tensor([[5, pad, 9]]), **options)


class Record:
    """A logits processor as in transformers: records its calls, and adds to one logit."""

    def __init__(self, token):
        self.token, self.calls = token, []

    def __call__(self, input_ids, scores):
        self.calls.append((input_ids.clone(), scores.clone()))
        scores[:, self.token] += 3
        return scores


@pytest.mark.parametrize("kind", ["function", "list", "LogitsProcessorList"])
def test_logits_processors_are_called_as_in_transformers(twins, batch, fresh_graphs, kind):
    """They get the same ids and logits, padding of ended rows included; no graph is captured."""
    ids, mask, free = batch
    eos, calls, texts = [int(free[1, 14])], [], []
    options = {
        "attention_mask": mask, "max_new_tokens": NEW, "suppress_tokens": [int(free[0, 13])],
        "repetition_penalty": 1.4, "eos_token_id": eos, "pad_token_id": 0, "do_sample": False,
    }  # fmt: skip
    for model in (twins.hf, twins.model):
        record = Record(token=11)
        given = transformers.LogitsProcessorList([record])
        if model is twins.model and kind != "LogitsProcessorList":
            given = record if kind == "function" else [record]
        texts.append(model.generate(ids, logits_processor=given, **options))
        calls.append(record.calls)
    assert torch.equal(*texts) and not fresh_graphs
    assert len(calls[0]) == len(calls[1])
    for theirs, ours in zip(*calls, strict=True):
        assert torch.equal(ours[0], theirs[0])
        close(ours[1], theirs[1])


def test_custom_processors_run_before_temperature_and_filters(twins):
    """A processor that leaves two equal tokens: both are sampled, and no other token."""

    def two(ids, logits):
        logits = torch.full_like(logits, -50.0)
        logits[:, [5, 9]] = 2.0
        return logits

    options = {"do_sample": True, "temperature": 9.0, "top_p": 0.9, "seed": 1, "max_new_tokens": 40}
    out = twins.model.generate(twins.prompt(1, 5), logits_processor=two, **options, **NEVER)
    assert set(out[0, 5:].tolist()) == {5, 9}


def test_wrong_processors_are_refused(twins):
    ids = twins.prompt(2, 5)
    for given, message in (
        (5, "logits_processor=5 must be a function or a list of functions"),
        (lambda ids, logits: None, r"must return logits \(2, 199\), not None"),
        (lambda ids, logits: logits[:1], r"must return logits \(2, 199\), not \(1, 199\)"),
    ):
        with pytest.raises(ValueError, match=message):
            twins.model.generate(ids, logits_processor=given, max_new_tokens=3)


def test_prefix_allowed_tokens_fn_equals_transformers(twins, batch):
    ids, mask, _ = batch

    def allowed(prompt: int, text):
        return [3 + prompt, 20 + len(text) % 7, 150]

    expected, found = both(twins, ids, mask, prefix_allowed_tokens_fn=allowed)
    assert torch.equal(found, expected)
    seen = []
    twins.model.generate(
        ids, attention_mask=mask, do_sample=True, num_return_sequences=2, max_new_tokens=1,
        prefix_allowed_tokens_fn=lambda prompt, text: seen.append(prompt) or [5], **NEVER,
    )  # fmt: skip
    assert seen == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="prefix_allowed_tokens_fn allows no token after the 12"):
        twins.model.generate(ids, prefix_allowed_tokens_fn=lambda *_: [], max_new_tokens=1)


@pytest.mark.parametrize("outputs", ["scores", "logits", "both", "none"])
def test_scores_and_logits_equal_transformers(twins, batch, fresh_graphs, outputs):
    ids, mask, free = batch
    options = {"repetition_penalty": 1.4, "suppress_tokens": [int(free[0, 13])]}
    options |= {"return_dict_in_generate": True, "output_scores": outputs in ("scores", "both")}
    options |= {"output_logits": outputs in ("logits", "both"), "eos": [int(free[1, 14])]}
    theirs, ours = both(twins, ids, mask, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        expected, found = getattr(theirs, name), getattr(ours, name)
        assert (found is None) == (expected is None) == (outputs not in (name, "both"))
        for x, y in zip(found or (), expected or (), strict=True):
            torch.testing.assert_close(x, y, atol=TOLERANCE, rtol=0)
    assert fresh_graphs


def test_stopping_criteria_equal_transformers(twins, batch):
    ids, mask, free = batch

    class Stop(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] == free[1, 15]

    criteria = transformers.StoppingCriteriaList([Stop()])
    expected, found = both(twins, ids, mask, stopping_criteria=criteria, eos=[2])
    assert torch.equal(found, expected) and (found[1, 16:] == 0).all()
    out = twins.model.generate(
        ids, attention_mask=mask, max_new_tokens=9, stopping_criteria=lambda ids, _: True, **NEVER
    )
    assert out.shape == (3, 13)


def test_max_time_ends_all_texts(twins, monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr("gemma_fast.engine.stopping.time.monotonic", lambda: next(seconds))
    out = twins.model.generate(twins.prompt(2, 5), max_new_tokens=9, max_time=6.5, **NEVER)
    assert out.shape == (2, 5 + 4)


def test_num_return_sequences_repeats_each_prompt(twins):
    ids = twins.prompt(2, 5)
    options = {"max_new_tokens": 8, "do_sample": True, "temperature": 3.0, "seed": 2, **NEVER}
    out = twins.model.generate(ids, num_return_sequences=3, **options)
    again = twins.model.generate(ids.repeat_interleave(3, dim=0), **options)
    assert torch.equal(out, again) and len({tuple(row) for row in out[:3].tolist()}) == 3
    with pytest.raises(ValueError, match="num_return_sequences=2 would give equal texts"):
        twins.model.generate(ids, max_new_tokens=2, num_return_sequences=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_new_tokens": 9}, "min_new_tokens=9 is more than the 4 tokens"),
        ({"min_length": 12}, "min_length=12 is more than the 9 tokens"),
    ],
    ids=str,
)
def test_a_minimum_above_the_maximum_warns_as_in_transformers(twins, options, message):
    ids = twins.prompt(1, 5)
    shared = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": 7}
    with pytest.warns(UserWarning, match="Unfeasible length constraints"):
        expected = twins.hf.generate(ids, **shared, **options)
    with pytest.warns(UserWarning, match=message):
        assert torch.equal(twins.model.generate(ids, **shared, **options), expected)


def test_top_k_is_50_by_default_as_in_transformers():
    """Almost uniform logits: without a filter, 1600 draws would give nearly all of 199 tokens."""
    model, ids = random_model(CONFIGS["gemma3-gqa"]), torch.tensor([[2, 5, 9]])
    options = {"do_sample": True, "temperature": 1e4, "max_new_tokens": 1, **NEVER}
    options |= {"num_return_sequences": 1600, "seed": 0}
    drawn = set(model.generate(ids, **options)[:, -1].tolist())
    assert drawn == set(model(ids).logits[0, -1].topk(50).indices.tolist())
    assert len(set(model.generate(ids, top_k=0, **options)[:, -1].tolist())) > 190


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False, "temperature": 0.0}, {"temperature": 0}, {"temperature": 0.0},
        {"do_sample": True, "temperature": 0.0}, {"do_sample": True, "temperature": 0, "top_k": 9},
        {"do_sample": False, "top_p": 0}, {"do_sample": False, "top_k": -1, "min_p": 7},
        {"top_p": 5.0}, {"do_sample": False, "temperature": -1.0}, {"temperature": 2.0},
        {"do_sample": True, "top_p": 0.0}, {"do_sample": True, "temperature": 1e-5},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("where", ["call", "generation_config", "model"])
def test_every_spelling_of_greedy_is_greedy(twins, monkeypatch, options, where):
    ids = twins.prompt(2, 6)
    shared = {"max_new_tokens": 6, **NEVER}
    expected = twins.model.generate(ids, **shared)
    if where == "model":
        monkeypatch.setattr(twins.model, "generation_config", options)
        options = {}
    if where == "generation_config":
        options = {"generation_config": options}
    assert torch.equal(twins.model.generate(ids, **shared, **options), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suppress_tokens": ["a"]}, r"suppress_tokens: \['a'\] must be a list of integers"),
        ({"suppress_tokens": 5}, "suppress_tokens: 5 must be a list of integers"),
        ({"bad_words_ids": [[]]}, r"bad_words_ids: \[\] must be a list of token ids below 199"),
        ({"bad_words_ids": [[5, 199]]}, r"bad_words_ids: \[5, 199\] must be .* below 199"),
        ({"bad_words_ids": [5]}, "bad_words_ids: 5 must be a list of token ids"),
        ({"bad_words_ids": 5}, "bad_words_ids: 5 must be a list of token ids"),
        ({"sequence_bias": {(5,): "x"}}, "sequence_bias=.* must be a dict"),
        ({"sequence_bias": {(5,): float("inf")}}, "sequence_bias=.* must be a dict"),
        ({"sequence_bias": {(5,): float("nan")}}, "sequence_bias=.* must be a dict"),
        ({"sequence_bias": [5]}, "sequence_bias=.* must be a dict"),
        ({"sequence_bias": {(500,): 1.0}}, r"sequence_bias: \(500,\) must be .* below 199"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1 must be an integer of at least 0"),
        ({"min_length": 2.5}, "min_length=2.5 must be an integer"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size=-1 is out of range"),
        ({"num_return_sequences": 0}, "num_return_sequences=0 must be an integer of at least 1"),
        ({"max_time": "x"}, "max_time='x' must be a number"),
        ({"stopping_criteria": [5]}, r"stopping_criteria=\[5\] must be a function"),
        ({"suppress_tokens": list(range(199))}, "not finite, .*such as suppress_tokens exclude ev"),
        ({"logits_processor": lambda ids, logits: logits * float("nan")}, "processor returned nan"),
        ({"stopping_criteria": lambda ids, _: None}, "must return True, False or a tensor .*None"),
        ({"stopping_criteria": lambda ids, _: [True] * 3}, r"tensor of bool \(1,\), not \(3,\)"),
        (
            {"prefix_allowed_tokens_fn": lambda *_: ["a"]},
            r"returned \['a'\]: it must return a list",
        ),
        ({"prefix_allowed_tokens_fn": lambda *_: [199]}, r"returned \[199\]: .* ids below 199"),
        ({"prefix_allowed_tokens_fn": lambda *_: None}, "returned None: it must return a list"),
        ({"streamer": print}, "streamer=.* must be an object with put and end: for example, Text"),
        ({"stop_strings": "a", "tokenizer": print}, "tokenizer=.* must be an object with decode"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "-".join(value),
)
def test_wrong_values_are_refused(twins, options, message):
    with pytest.raises(ValueError, match=message):
        twins.model.generate(twins.prompt(1, 5), max_new_tokens=2, **options)
