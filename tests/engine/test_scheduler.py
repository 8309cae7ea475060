"""Tests the scheduler: texts that join and leave are those of generate(), in any company."""

import itertools
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from decoder_checks import NEVER
from marks import ALL_FAMILIES, slow
from tiny_models import CONFIGS, random_model, two_layers
from triton_interpreter import interpreter

from gemma_fast import GemmaForCausalLM
from gemma_fast.checkpoint.random import RandomCheckpoint
from gemma_fast.engine import scheduler as scheduler_module
from gemma_fast.engine.decoder import Decoder, bucket_of
from gemma_fast.engine.scheduler import QueueFull, Scheduler

# Options of texts that run beside one another.
MIXED = [
    {}, {"do_sample": True, "temperature": 2.0, "seed": 3, "top_k": 0},
    {"do_sample": True, "temperature": 3.0, "seed": 5, "top_k": 9, "top_p": 0.9},
    {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"suppress_tokens": [3, 4, 5]},
    {"do_sample": True, "seed": 4, "min_p": 0.01, "temperature": 2.5},
    {"sequence_bias": {(7, 8): 9.0, (8,): 2.0}}, {"min_new_tokens": 3},
]  # fmt: skip
LENGTHS = [3, 31, 1, 12, 7, 5, 22, 2, 9, 17, 4]


def prompts(model, lengths=LENGTHS) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    vocab = model.config.vocab_size
    return [torch.randint(3, vocab, (length,), generator=draw) for length in lengths]


def options_of(number: int) -> dict:
    options = {"eos_token_id": [], **MIXED[number % len(MIXED)]}
    if "min_new_tokens" in options:
        options["eos_token_id"] = [5, 6]
    return options | {"max_new_tokens": 3 + number % 6}


def alone(model, ids, **options) -> list[int]:
    """Returns the new tokens of generate()."""
    return model.generate(ids.unsqueeze(0), **options)[0, len(ids) :].tolist()


def run(scheduler: Scheduler) -> None:
    while scheduler:
        scheduler.step()


@ALL_FAMILIES
def test_texts_are_those_of_generate(twins):
    """11 texts with different lengths and options share four rows; prompts are read in parts."""
    given = prompts(twins.model)
    scheduler = Scheduler(Decoder(twins.model, 4, 64), chunk=8)
    texts = [
        scheduler.add(twins.model.request(ids, **options_of(i))) for i, ids in enumerate(given)
    ]
    run(scheduler)
    for i, (ids, text) in enumerate(zip(given, texts, strict=True)):
        assert text.ids == alone(twins.model, ids, **options_of(i)), options_of(i)
    assert len({tuple(text.ids) for text in texts}) == len(texts)


@pytest.mark.parametrize("kernels", [False, *slow(True)], ids=["C", "kernels"])
def test_a_step_ahead_does_not_change_texts(graphs, kernels):
    """On a GPU, the next step starts before the tokens of the last one are read."""
    model = random_model(two_layers("gemma3-gqa"))
    given = prompts(model, [3, 11, 1, 6, 2])
    expected = [alone(model, ids, **options_of(i)) for i, ids in enumerate(given)]
    graphs.clear()
    with interpreter() if kernels else nullcontext():
        scheduler = Scheduler(Decoder(model, 4, 64), chunk=4)
        texts = [scheduler.add(model.request(ids, **options_of(i))) for i, ids in enumerate(given)]
        run(scheduler)
    assert [text.ids for text in texts] == expected
    assert graphs and {graph.cache.batch for graph in graphs} <= {1, 2, 4}


def test_a_step_has_as_many_rows_as_running_texts_need(twins, monkeypatch):
    """Texts in higher rows move down when the texts in lower rows have ended."""
    sizes, model = [], twins.model
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, n=None: sizes.append(n) or step(self, n))
    scheduler = Scheduler(Decoder(model, 8, 64))
    given = prompts(model, [5] * 8)
    texts = [
        scheduler.add(model.request(ids, max_new_tokens=20 if i > 5 else 4, **NEVER))
        for i, ids in enumerate(given)
    ]
    run(scheduler)
    assert sizes == [8] * 3 + [2] * 16
    for ids, text in zip(given, texts, strict=True):
        assert text.ids == alone(model, ids, max_new_tokens=len(text.ids), **NEVER)


def test_between_two_steps_at_most_chunk_tokens_of_prompts_are_read(twins, monkeypatch):
    model, read, between = twins.model, [0], []
    for name in ("read_prompt", "read_last"):
        method = getattr(Decoder, name)

        def counted(self, row, ids, *args, method=method):
            read[0] += ids.shape[1]
            return method(self, row, ids, *args)

        monkeypatch.setattr(Decoder, name, counted)
    step = Decoder.step

    def counted_step(self, rows):
        between.append(read[0])
        read[0] = 0
        return step(self, rows)

    monkeypatch.setattr(Decoder, "step", counted_step)
    scheduler = Scheduler(Decoder(model, 4, 64), chunk=8)
    first = scheduler.add(model.request(prompts(model, [3])[0], max_new_tokens=30, **NEVER))
    for ids in prompts(model, [31, 2, 5, 1]):
        scheduler.add(model.request(ids, max_new_tokens=4, **NEVER))
    run(scheduler)
    assert first.reason == "length" and len(first.ids) == 30
    # The parts of the prompt of 31 tokens are 8, 8, 8 and 7; those after it wait for their turn.
    assert between[:6] == [3, 8, 8, 8, 7, 2 + 5]
    assert sum(between) == 3 + 31 + 2 + 5 + 1


def test_the_order_of_arrival_decides(twins):
    model = twins.model
    scheduler = Scheduler(Decoder(model, 2, 64), chunk=8, queue=3)
    lengths = [40, 2, 3]
    texts = [
        scheduler.add(model.request(ids, max_new_tokens=2, **NEVER))
        for ids in prompts(model, lengths)
    ]
    with pytest.raises(QueueFull, match="3 texts are waiting, which is the limit"):
        scheduler.add(model.request([5], max_new_tokens=2, **NEVER))
    ended = []
    while scheduler:
        ended += [text for text in scheduler.step() if text.reason]
        assert scheduler.waiting + scheduler.running + len(ended) == 3
    assert ended == texts
    scheduler.add(model.request([5], max_new_tokens=2, **NEVER))  # the queue has room again
    assert (scheduler.waiting, scheduler.running, scheduler.tokens) == (1, 0, 0)


def test_cancelled_texts_free_their_rows_and_change_no_other_text(twins):
    """Cancels a text that waits, one whose prompt is being read, and one that runs."""
    model, given = twins.model, prompts(twins.model, [5, 40, 6, 4, 3])
    scheduler = Scheduler(Decoder(model, 2, 64), chunk=8)
    texts = [scheduler.add(model.request(ids, max_new_tokens=9, **NEVER)) for ids in given]
    for _ in range(2):
        scheduler.step()
    assert len(texts[0].ids) == 3 and not texts[1].ids and scheduler.waiting == 3
    before = texts[0].ids.copy()
    for text in (*texts[:2], texts[2], texts[2]):
        scheduler.cancel(text)
    assert scheduler.running == 0 and scheduler.waiting == 2
    assert set(scheduler.step()) == {*texts}  # the last two got tokens
    run(scheduler)
    assert [text.reason for text in texts] == ["cancelled"] * 3 + ["length"] * 2
    assert texts[0].ids == before
    for ids, text in zip(given[3:], texts[3:], strict=True):
        assert text.ids == alone(model, ids, max_new_tokens=9, **NEVER)
    scheduler.cancel(texts[4])
    assert texts[4].reason == "length" and not scheduler


def test_a_text_that_fails_ends_alone(twins, monkeypatch):
    """A text whose logits are all excluded, and one whose prompt does not fit in memory."""
    model, given = twins.model, prompts(twins.model, [5, 7, 6, 4])
    every = [*range(model.config.vocab_size)]
    scheduler = Scheduler(Decoder(model, 4, 64))
    broken = {1: {"suppress_tokens": every}}
    texts = [
        scheduler.add(model.request(ids, max_new_tokens=5, **NEVER, **broken.get(i, {})))
        for i, ids in enumerate(given)
    ]
    read_last = Decoder.read_last

    def read(self, row, ids, *args):
        if ids.shape[1] == 6:
            raise torch.OutOfMemoryError("no memory for a prefill")
        return read_last(self, row, ids, *args)

    monkeypatch.setattr(Decoder, "read_last", read)
    run(scheduler)
    assert [text.reason for text in texts] == ["length", "error", "error", "length"]
    assert "the logits after 7 tokens are not finite" in str(texts[1].error)
    assert "no memory for a prefill" in str(texts[2].error)
    for i in (0, 3):
        assert texts[i].ids == alone(model, given[i], max_new_tokens=5, **NEVER)


def test_after_a_step_that_fails_the_other_texts_go_on(twins, monkeypatch):
    """The running texts end. A text whose prompt was being read is not affected."""
    model, given = twins.model, prompts(twins.model, [5, 20, 4])
    scheduler = Scheduler(Decoder(model, 2, 64), chunk=8)
    texts = [scheduler.add(model.request(ids, max_new_tokens=5, **NEVER)) for ids in given]
    scheduler.step()
    logits = type(model).hidden_states

    def fails(self, ids, cache, *args, **options):
        if ids.shape[1] > 1:
            return logits(self, ids, cache, *args, **options)
        with cache.unfinished("the step did not finish"):
            raise torch.OutOfMemoryError("no memory for a step")

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "hidden_states", fails)
        scheduler.step()
    run(scheduler)
    assert [text.reason for text in texts] == ["error", "length", "length"]
    assert "no memory for a step" in str(texts[0].error)
    for ids, text in zip(given[1:], texts[1:], strict=True):
        assert text.ids == alone(model, ids, max_new_tokens=5, **NEVER)


def test_log_probabilities_that_do_not_fit_in_memory_end_the_texts_of_the_step(twins, monkeypatch):
    model, given = twins.model, prompts(twins.model, [5, 4, 3])
    scheduler = Scheduler(Decoder(model, 2, 64))
    texts = [
        scheduler.add(model.request(ids, max_new_tokens=5, logprobs=1, **NEVER)) for ids in given
    ]
    start = scheduler_module.start_logprobs

    def fails(sampler, wanted):
        if len(wanted) > 1:
            raise torch.OutOfMemoryError("no memory for log-probabilities")
        return start(sampler, wanted)

    with monkeypatch.context() as patch:
        patch.setattr(scheduler_module, "start_logprobs", fails)
        scheduler.step()
    run(scheduler)
    assert [text.reason for text in texts] == ["error", "error", "length"]
    assert "no memory for log-probabilities" in str(texts[0].error)
    assert texts[2].ids == alone(model, given[2], max_new_tokens=5, **NEVER)


def test_max_time_counts_from_the_arrival(twins, monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr("gemma_fast.engine.stopping.time.monotonic", lambda: next(seconds))
    model = twins.model
    scheduler = Scheduler(Decoder(model, 1, 64))
    texts = [
        scheduler.add(model.request([5, 6], max_new_tokens=50, max_time=time, **NEVER))
        for time in (40, 9)
    ]
    run(scheduler)
    assert [text.reason for text in texts] == ["time", "time"]
    assert texts[0].ids and not texts[1].ids


def test_a_prefix_is_computed_once(twins, monkeypatch):
    model, tokens = twins.model, [0]
    hidden_states = type(model).hidden_states

    def counted(self, ids, *args, **kwargs):
        tokens[0] += ids.numel()
        return hidden_states(self, ids, *args, **kwargs)

    prefix, *rests = prompts(model, [37, 3, 9, 1])
    given = [torch.cat((prefix, rest)) for rest in rests] + [rests[0], prefix]
    expected = [alone(model, ids, max_new_tokens=6, **NEVER) for ids in given]
    monkeypatch.setattr(type(model), "hidden_states", counted)
    scheduler = Scheduler(Decoder(model, 8, 128), prefix=prefix.tolist(), chunk=16)
    texts = [scheduler.add(model.request(ids, max_new_tokens=1, **NEVER)) for ids in given]
    run(scheduler)
    assert tokens == [37 + (3 + 9 + 1) + 3 + 37]
    texts = [scheduler.add(model.request(ids, max_new_tokens=6, **NEVER)) for ids in given]
    run(scheduler)
    assert [text.ids for text in texts] == expected
    with pytest.raises(ValueError, match="prefix: 300 tokens do not fit max_length=256"):
        Scheduler(Decoder(model, 1, 256), prefix=[5] * 300)


@pytest.mark.parametrize("ahead", [False, True], ids=["synchronous", "ahead"])
def test_logprobs_are_those_of_the_models_logits(twins, request, ahead):
    if ahead:
        request.getfixturevalue("graphs")
    model, given = twins.model, prompts(twins.model, [5, 9, 3])
    scheduler = Scheduler(Decoder(model, 4, 64))
    hot = {"do_sample": True, "temperature": 3.0, "seed": 1, "sequence_bias": {(9,): 4.0}}
    texts = [
        scheduler.add(model.request(ids, max_new_tokens=4, logprobs=count, **NEVER, **hot))
        for ids, count in zip(given, (0, 3, None), strict=True)
    ]
    run(scheduler)
    assert texts[2].logprobs == []
    for ids, text, count in zip(given[:2], texts[:2], (0, 3), strict=True):
        whole = torch.cat((ids, torch.tensor(text.ids))).unsqueeze(0)
        logp = model(whole).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        assert len(text.logprobs) == 4
        for row, token, (logprob, top) in zip(logp, text.ids, text.logprobs, strict=True):
            assert logprob == pytest.approx(float(row[token]), abs=2e-5)
            assert len(top) == count
            for (found, value), best in zip(top, row.topk(count).indices.tolist(), strict=True):
                assert found == best and value == pytest.approx(float(row[best]), abs=2e-5)


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("rows", [4, 24], ids="{} rows".format)
def test_an_invariant_text_has_the_same_bits_in_any_company(rows, quantize):
    """Compares log-probabilities of a text that runs alone, and one that runs beside others whose
    tokens are sampled and filtered. A step of fewer rows has other bits."""
    config = replace(CONFIGS["gemma3-gqa"], hidden_size=256, intermediate_size=512)
    model = GemmaForCausalLM.from_checkpoint(
        RandomCheckpoint(config), dtype=torch.float32, device="cpu", quantize=quantize
    )
    ids, *others = prompts(model, [7, *range(1, rows)])
    chosen = {"max_new_tokens": 12, "do_sample": True, "top_p": 0.9, "seed": 1, "logprobs": 2}

    def logprobs(company, invariant=True):
        scheduler = Scheduler(Decoder(model, rows, 64), chunk=8, invariant=invariant)
        for i, other in enumerate(company):
            scheduler.add(model.request(other, **options_of(i)))
        scheduler.step()
        text = scheduler.add(model.request(ids, **chosen, **NEVER))
        run(scheduler)
        return text.logprobs

    assert logprobs([]) == logprobs(others)
    assert quantize == "none" or logprobs([], invariant=False) != logprobs([])


def test_warm_up_runs_every_number_of_rows(twins, monkeypatch):
    sizes, step = [], Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, n=None: sizes.append(n) or step(self, n))
    model, given = twins.model, prompts(twins.model, [5, 20])
    scheduler = Scheduler(Decoder(model, 24, 64), chunk=16)
    scheduler.warm_up()
    assert set(sizes) == {bucket_of(rows) for rows in range(1, 25)} == {1, 2, 4, 8, 16, 24}
    texts = [scheduler.add(model.request(ids, max_new_tokens=5, **NEVER)) for ids in given]
    run(scheduler)
    for ids, text in zip(given, texts, strict=True):
        assert text.ids == alone(model, ids, max_new_tokens=5, **NEVER)


def test_requests_that_do_not_fit_raise(twins):
    scheduler = Scheduler(Decoder(twins.model, 2, 256))
    with pytest.raises(ValueError, match=r"a prompt of 250 tokens and max_new_tokens=7 do not fit"):
        scheduler.add(twins.model.request([5] * 250, max_new_tokens=7))
    with pytest.raises(ValueError, match=r"stop_strings=.*needs tokenizer"):
        scheduler.add(twins.model.request([5], max_new_tokens=7, stop_strings=["x"]))
    with pytest.raises(ValueError, match=r"chunk=0 must be at least 1"):
        Scheduler(Decoder(twins.model, 2, 256), chunk=0)
    text = scheduler.add(twins.model.request([5] * 250, max_new_tokens=6, **NEVER))
    run(scheduler)
    assert text.ids == alone(twins.model, torch.tensor([5] * 250), max_new_tokens=6, **NEVER)
