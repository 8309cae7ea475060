"""Tests /v1/completions and /v1/models with the official client: texts are those of generate()."""

import asyncio
import json
from types import SimpleNamespace

import pytest
import torch
from http_server import running

from gemma_fast.engine.logprobs import TokenLogprobs
from gemma_fast.engine.request import seed_of
from gemma_fast.server.answers import Completion
from gemma_fast.server.choice import Choice, Delta
from gemma_fast.server.job import Job
from gemma_fast.server.reply import Reply
from gemma_fast.server.ticket import Event
from gemma_fast.text.answer import AnswerText

PROMPT = "hello the world"
SAMPLED = {"do_sample": True, "top_k": 0}


@pytest.fixture
def create(client):
    def create(**options):
        return client.completions.create(**{"model": "tiny", "prompt": PROMPT, **options})

    return create


def generated(tiny, prompt: str, new: int, **options) -> list[int]:
    """Returns the new ids of generate()."""
    model, tokenizer = tiny
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    return model.generate(ids, max_new_tokens=new, **options)[0, ids.shape[1] :].tolist()


def text_of(tokenizer, ids: list[int]) -> str:
    answer = AnswerText(tokenizer, [])
    return "".join(piece.text for piece in [*answer.add(ids), *answer.end()])


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.owned_by, model.max_model_len) == ("tiny", "gemma_fast", 256)
    assert client.models.retrieve("tiny") == model


def test_greedy_text_is_that_of_generate(create, tiny):
    answer = create(temperature=0, max_tokens=20, logprobs=0)
    ids = generated(tiny, PROMPT, 20)
    (choice,) = answer.choices
    assert choice.text == text_of(tiny[1], ids)
    assert choice.logprobs.tokens == [token_text(tiny[1], token) for token in ids]
    assert (choice.index, choice.finish_reason) == (0, "length")
    usage = answer.usage
    prompt = len(tiny[1](PROMPT).input_ids)
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompt, 20)
    assert usage.total_tokens == prompt + 20
    assert (answer.object, answer.model, answer.id[:5]) == ("text_completion", "tiny", "cmpl-")


def token_text(tokenizer, token: int) -> str:
    name = tokenizer.convert_ids_to_tokens(token)
    byte = name.startswith("<0x")
    return f"bytes:\\x{int(name[3:5], 16):02x}" if byte else tokenizer.decode([token])


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"temperature": 0.7}, {"temperature": 1.3, "top_p": 0.8},
        {"extra_body": {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.3}},
    ],
    ids=str,
)  # fmt: skip
def test_seed_gives_the_text_of_generate(create, tiny, settings):
    given = {**settings, **settings.get("extra_body", {})}
    given.pop("extra_body", None)
    for seed in (1, 2, (1 << 63) - 1):
        answer = create(max_tokens=15, seed=seed, logprobs=0, **settings)
        ids = generated(tiny, PROMPT, 15, seed=seed, **{**SAMPLED, **given})
        assert answer.choices[0].logprobs.tokens == [token_text(tiny[1], x) for x in ids]


def test_text_without_a_seed_differs_each_time(create):
    assert len({create(max_tokens=20).choices[0].text for _ in range(3)}) == 3


def test_settings_of_a_checkpoint_that_samples_are_the_default(tiny):
    model, tokenizer = tiny
    before = model.generation_config
    model.generation_config = type(before)(before | {"do_sample": True, "top_k": 3})
    try:
        with running(model, tokenizer) as server:
            create = server.client().completions.create
            found = [
                create(model="tiny", prompt=PROMPT, max_tokens=9, seed=1, logprobs=0, **more)
                for more in ({}, {"extra_body": {"top_k": 0}})
            ]
    finally:
        model.generation_config = before
    for top_k, answer in zip((3, 0), found, strict=True):
        ids = generated(tiny, PROMPT, 9, seed=1, do_sample=True, top_k=top_k)
        assert answer.choices[0].logprobs.tokens == [token_text(tokenizer, x) for x in ids]


def test_several_prompts_and_texts(create, tiny):
    prompts = ["hello", "a b c", "in the"]
    answer = create(prompt=prompts, n=2, seed=5, max_tokens=6, logprobs=0)
    assert [choice.index for choice in answer.choices] == [*range(6)]
    for choice in answer.choices:
        prompt, copy = divmod(choice.index, 2)
        ids = generated(tiny, prompts[prompt], 6, seed=seed_of(5, copy), **SAMPLED)
        assert choice.logprobs.tokens == [token_text(tiny[1], x) for x in ids]
    counted = sum(len(tiny[1](prompt).input_ids) for prompt in prompts)
    assert answer.usage.prompt_tokens == counted


def test_prompt_may_be_token_ids(create, tiny):
    ids = tiny[1](PROMPT).input_ids
    expected = create(temperature=0).choices[0].text
    assert create(prompt=ids, temperature=0).choices[0].text == expected
    assert create(prompt=[ids], temperature=0).choices[0].text == expected


def test_default_length_is_16_tokens(create):
    assert create(temperature=0).usage.completion_tokens == 16


def test_stream_has_the_same_text_and_usage(create):
    options = {"seed": 4, "max_tokens": 25, "n": 2, "logprobs": 1, "logit_bias": {"1": -100}}
    whole = create(**options)
    chunks = [*create(**options, stream=True, stream_options={"include_usage": True})]
    for choice in whole.choices:
        parts = [x.choices[0] for x in chunks[:-1] if x.choices[0].index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
        assert [x for part in parts for x in part.logprobs.tokens] == choice.logprobs.tokens
        assert len(parts) == 24, "one for each step, the first of which gives two tokens"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_event_of_a_stream_is_one_line(tiny):
    """Many clients split lines as str.splitlines does."""
    model, tokenizer = tiny
    text = "a\u2028b\x85c\x0cd漢"

    async def stream() -> list[str]:
        job = Job(SimpleNamespace(add=lambda ticket: None))
        request = model.request([2], max_new_tokens=50)
        reply = Reply(job, [request], Completion("tiny", tokenizer), tokenizer, texts=1)
        for token in tokenizer.encode(text, add_special_tokens=False):
            job._events.put_nowait(Event(0, None, [token]))
        job._events.put_nowait(Event(0, "length"))
        return [
            line for event in [x async for x in reply.stream(False)] for line in event.splitlines()
        ]

    lines = [line for line in asyncio.run(stream()) if line]
    assert all(line.startswith("data: ") for line in lines)
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text


def test_stream_without_usage_ends_with_the_finish_reason(create):
    chunks = [*create(max_tokens=3, stream=True, temperature=0)]
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.choices for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_text_ends_before_a_stop_string(create, stream):
    whole = create(temperature=0, max_tokens=30).choices[0].text
    stop = whole[8:11]
    answer = create(temperature=0, max_tokens=30, stop=["never", stop], stream=stream)
    choices = [x.choices[0] for x in answer] if stream else [answer.choices[0]]
    assert "".join(choice.text for choice in choices) == whole[: whole.find(stop)]
    assert choices[-1].finish_reason == "stop"
    short = create(temperature=0, max_tokens=30, stop=stop)
    assert short.usage.completion_tokens < 30, "the engine does not go on after the stop string"


def test_end_token_ends_a_text(create, tiny):
    answer = create(temperature=0, max_tokens=9, logit_bias={"1": 100}, logprobs=0)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == ("", "stop")
    assert choice.logprobs.tokens == ["<eos>"]


def test_logit_bias_is_added(create, tiny):
    token = tiny[1].token_to_id("hello")
    answer = create(temperature=0, max_tokens=4, logit_bias={str(token): 100})
    assert answer.choices[0].text == "hello" * 4
    ids = generated(tiny, PROMPT, 9, sequence_bias={(9,): 2.5})
    answer = create(temperature=0, max_tokens=9, logit_bias={"9": 2.5}, logprobs=0)
    assert answer.choices[0].logprobs.tokens == [token_text(tiny[1], x) for x in ids]


def test_logprobs_are_log_softmax_of_the_logits(create, tiny):
    model, tokenizer = tiny
    answer = create(temperature=0.5, seed=3, max_tokens=12, logprobs=5, logit_bias={"5": 1})
    found = answer.choices[0].logprobs
    new = generated(tiny, PROMPT, 12, seed=3, temperature=0.5, sequence_bias={(5,): 1.0}, **SAMPLED)
    prompt = tokenizer(PROMPT).input_ids
    logp = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected = logp.gather(1, torch.tensor(new)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found.token_logprobs), expected, atol=1e-4, rtol=0)
    best = logp.topk(5)
    for top, ids, values in zip(found.top_logprobs, best.indices, best.values, strict=True):
        assert [*top] == [token_text(tokenizer, int(x)) for x in ids]
        torch.testing.assert_close(torch.tensor([*top.values()]), values, atol=1e-4, rtol=0)


@pytest.mark.parametrize("stream", [False, True])
def test_text_offset_is_the_start_of_a_token_in_the_text(tiny, stream):
    """Also while text is held back, because it may begin a stop string."""
    model, tokenizer = tiny
    ids = tokenizer.encode("hello é the<unused9> 漢😀 world", add_special_tokens=False)
    request = model.request([2], max_new_tokens=50, stop_strings=["the never"], logprobs=0)
    choice = Choice(0, request, tokenizer, chat=False, calls=False)
    events = [Event(0, None, [x], [TokenLogprobs(-1.0, [])]) for x in ids]
    deltas = [choice.take(event) for event in [*events, Event(0, "length")]]
    answers = Completion("tiny", tokenizer)
    parts = map(answers.chunk, deltas) if stream else [answers.whole([sum_of(deltas)], None)]
    choices = [part["choices"][0] for part in parts]
    text = "".join(x["text"] for x in choices)
    found = [x["logprobs"] for x in choices if x["logprobs"]]
    starts = [start for logprobs in found for start in logprobs["text_offset"]]
    for start, token in zip(starts, ids, strict=True):
        name = token_text(tokenizer, token)
        if name.startswith("bytes:"):
            byte = int(name[-2:], 16)
            character = text[start - (byte & 0xC0 == 0x80)]  # a byte inside begins no character
            assert byte in character.encode()
        elif name != "<unused9>":
            assert text[start:].startswith(name)
    assert len(starts) > len(set(starts)), "a special token has no text"


def sum_of(deltas: list[Delta]) -> Delta:
    total, *rest = deltas
    for delta in rest:
        total += delta
    return total
