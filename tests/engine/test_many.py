"""Tests GemmaForCausalLM.generate_many and request."""

import itertools
from contextlib import nullcontext

import pytest
import torch
from chat_checkpoint import write_chat_checkpoint
from decoder_checks import NEVER, SAMPLINGS
from tiny_models import CONFIGS, random_model

from gemma_fast import GemmaForCausalLM, Tokenizer

MANY_KINDS = [*SAMPLINGS.values(), {"logprobs": 1}]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """Returns a model with a tokenizer."""
    path = write_chat_checkpoint(tmp_path_factory.mktemp("many"))
    return GemmaForCausalLM.from_pretrained(path, device="cpu"), Tokenizer.from_pretrained(path)


def alone(model, ids, **options) -> list[int]:
    return model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()


def test_each_request_has_its_own_options_over_those_of_the_call(twins):
    model = twins.model
    requests = [
        {"input_ids": [5, 6, 7]},
        {"input_ids": torch.tensor([9, 8]), "max_new_tokens": 2},
        {"input_ids": torch.tensor([[4, 5, 6, 7]]), "do_sample": True, "seed": 3, "top_k": 0},
        {"input_ids": [3], "eos_token_id": None, "temperature": 0.5},
    ]
    shared = {"max_new_tokens": 9, "eos_token_id": [], "temperature": 2.0}
    found = {x.number: x for x in model.generate_many(requests, batch_size=2, **shared)}
    for number, request in enumerate(requests):
        ids = torch.as_tensor(request["input_ids"]).flatten().tolist()
        given = {name: value for name, value in request.items() if name != "input_ids"}
        assert found[number].ids == alone(model, ids, **{**shared, **given})
        assert (found[number].reason, found[number].error) == ("length", None)
    assert [len(found[i].ids) for i in range(4)] == [9, 2, 9, 9]


def test_generate_is_not_invariant_after_generate_many_was(twins):
    """A decoder is kept for the next call, which has settings of its own."""
    model = random_model(CONFIGS["gemma3-gqa"])
    request = {"input_ids": [5, 6], "max_new_tokens": 3}
    [*model.generate_many([request], batch_size=1, batch_invariant=True)]
    (kept,) = model.decoders.values()
    assert kept.sampler.process is not None
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=3)
    assert [*model.decoders.values()] == [kept]
    assert kept.sampler.process is None


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ([10**6], "token id 1000000 is outside the vocabulary"),
        ([-3], "token id -3 is outside the vocabulary"),
        ([1.5], "must be token ids"),
        ([5] * 300, "prefix: 300 tokens do not fit max_length=256"),
    ],
    ids=["beyond the vocabulary", "negative", "not ids", "too long"],
)
def test_a_prefix_that_is_refused_keeps_the_decoder(prefix, message):
    model = random_model(CONFIGS["gemma3-gqa"])
    request = {"input_ids": [5, 6], "max_new_tokens": 3}
    [*model.generate_many([request], batch_size=1)]
    (kept,) = model.decoders.values()
    with pytest.raises(ValueError, match=message):
        [*model.generate_many([request], batch_size=1, prefix_ids=prefix)]
    [found] = model.generate_many([request], batch_size=1, prefix_ids=torch.tensor([5]))
    assert found.ids == alone(model, [5, 6], max_new_tokens=3)
    assert [*model.decoders.values()] == [kept]


def test_results_come_as_their_texts_end(twins):
    requests = [{"input_ids": [5], "max_new_tokens": new} for new in (9, 2, 2, 2, 2)]
    found = [x.number for x in twins.model.generate_many(requests, batch_size=2, **NEVER)]
    assert found == [1, 2, 3, 4, 0]


def test_a_request_that_is_refused_has_an_error_and_the_others_go_on(twins):
    model = twins.model
    context, vocab = model.config.max_position_embeddings, model.config.vocab_size
    wrong = {
        "the prompt is empty": {"input_ids": []},
        f"token id {vocab} is outside the vocabulary": {"input_ids": [vocab]},
        "must be token ids": {"input_ids": [1.5]},
        "input_ids must be a tensor, not a str": {"input_ids": "text"},
        "input_ids has 2 prompts": {"input_ids": torch.ones(2, 3, dtype=torch.long)},
        f"do not fit the model's context of {context}": {"input_ids": [5] * context},
        "temperature=-1": {"input_ids": [5], "do_sample": True, "temperature": -1},
        "num_return_sequences=2": {"input_ids": [5], "num_return_sequences": 2},
        "output_scores": {"input_ids": [5], "output_scores": True},
        "logprobs=21 must be an integer from 0 to 20": {"input_ids": [5], "logprobs": 21},
        "unexpected keyword argument 'temprature': did you mean temperature": {
            "input_ids": [5], "temprature": 1,
        },
        "num_beams=3 is not supported": {"input_ids": [5], "num_beams": 3},
        "missing 1 required positional argument: 'input_ids'": {"max_new_tokens": 3},
        "unexpected keyword argument 'streamer'": {"input_ids": [5], "streamer": None},
        "'str' object is not a mapping": "text",
        "'NoneType' object is not a mapping": None,
    }  # fmt: skip
    requests = [x for request in wrong.values() for x in (request, {"input_ids": [5, 6]})]
    options = {"max_new_tokens": 4, **NEVER}
    found = sorted(model.generate_many(requests, batch_size=3, **options))
    assert [x.number for x in found] == [*range(2 * len(wrong))]
    for message, bad, good in zip(wrong, found[::2], found[1::2], strict=True):
        assert (bad.reason, bad.ids) == ("error", []) and message in str(bad.error)
        assert good.ids == alone(model, [5, 6], **options)


def test_requests_are_read_only_as_fast_as_texts_end(twins):
    read = []

    def endless():
        for i in itertools.count():
            read.append(i)
            yield {"input_ids": [3 + i % 50], "max_new_tokens": 3}

    model = twins.model
    results = model.generate_many(endless(), batch_size=4, max_length=64, **NEVER)
    for _ in range(20):
        assert next(results).error is None
    assert len(read) <= 20 + 4
    assert 4 not in model.decoders  # it is in use
    results.close()
    assert model.decoders[4].cache.batch == 4
    assert len([*model.generate_many([{"input_ids": [5]}], max_new_tokens=2, **NEVER)]) == 1


def test_the_cache_has_room_for_the_longest_request_of_a_list(twins, monkeypatch):
    sizes, model = [], twins.model
    take = type(model.decoders).take
    monkeypatch.setattr(
        type(model.decoders), "take", lambda *args: sizes.append(args[3]) or take(*args)
    )
    requests = [{"input_ids": [5] * length, "max_new_tokens": 3} for length in (2, 11, 4)]
    assert len([*model.generate_many(requests, **NEVER)]) == 3
    (result,) = model.generate_many(iter(requests[:1]), **NEVER)
    assert result.reason == "length"
    assert sizes == [14, min(8192, model.config.max_position_embeddings)]
    for length, fits in ((14, True), (13, False)):  # although the cache is rounded up to 256 tokens
        (result,) = model.generate_many(requests[1:2], max_length=length, **NEVER)
        assert (result.error is None) == fits
    assert "a prompt of 11 tokens and max_new_tokens=3 do not fit max_length=13" in str(
        result.error
    )


def test_texts_after_generate_and_before_it_share_a_decoder(twins):
    """generate() and generate_many() use the same decoders, and leave nothing in them."""
    model, ids = twins.model, torch.arange(3, 19).view(4, 4)
    options = {"max_new_tokens": 5, **NEVER}
    expected = model.generate(ids, **options)
    requests = [{"input_ids": row} for row in ids]
    biased = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 1, "logprobs": 3}
    for _ in range(2):
        assert len([*model.generate_many(requests, batch_size=4, **options, **biased)]) == 4
        assert torch.equal(model.generate(ids, **options), expected)
        found = sorted(model.generate_many(requests, batch_size=4, **options))
        assert [x.ids for x in found] == expected[:, 4:].tolist()


def test_it_works_inside_and_outside_of_inference_mode(twins):
    model = random_model(twins.config)
    requests = [{"input_ids": [5, 6, i], **options} for i in (7, 8, 9) for options in MANY_KINDS]
    for mode in (torch.inference_mode, nullcontext, torch.inference_mode):
        with mode():
            found = sorted(
                model.generate_many(requests, batch_size=2, max_new_tokens=3, prefix_ids=[5, 6])
            )
        assert [x.error for x in found] == [None] * len(requests)


def test_stop_strings_begin_in_the_new_text(chat):
    model, tokenizer = chat
    prompt = tokenizer("hello the world").input_ids
    free = alone(model, prompt, max_new_tokens=8)
    before, first = (tokenizer.decode(ids) for ids in (prompt, prompt + free[:1]))
    within = tokenizer.decode(free[:2])
    across = first[len(before) - 2 :]

    def many(stop):
        request = {"input_ids": prompt, "max_new_tokens": 8, "stop_strings": stop}
        (result,) = model.generate_many([request], tokenizer=tokenizer)
        return result

    assert many([within]).ids == free[:2] and many([within]).reason == "stop"
    assert many([across]).ids == free
    assert len(alone(model, prompt, max_new_tokens=8, stop_strings=across, tokenizer=tokenizer)) < 8


def test_a_batch_size_below_one_raises(twins):
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        next(twins.model.generate_many([], batch_size=0))
