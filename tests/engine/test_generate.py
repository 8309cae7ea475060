"""Compares generate() with transformers. Also tests streamers, errors, and the conditions that end
a text."""

from dataclasses import replace

import pytest
import torch
from marks import ALL_FAMILIES
from tiny_models import left_padded

from gemma_fast.engine import decoder
from gemma_fast.engine.sampler import Sampler

NEVER = {"eos_token_id": []}  # no token ends a text


class Letters:
    """Decodes each id to one character, so that tests can choose stop strings by id."""

    def decode(self, ids) -> str:
        return "".join(chr(0x4E00 + i) for i in ids)


class Recorder:
    """Records what a streamer gets. Call number `interrupt_after` of put() simulates Ctrl-C."""

    def __init__(self, interrupt_after: int | None = None):
        self.puts, self.ended, self.interrupt_after = [], 0, interrupt_after

    def put(self, ids):
        self.puts.append(ids)
        if len(self.puts) == self.interrupt_after:
            raise KeyboardInterrupt

    def end(self):
        self.ended += 1


def hf_generate(twins, ids, **kwargs):
    return twins.hf.generate(ids, do_sample=False, pad_token_id=0, **kwargs)


@ALL_FAMILIES
@pytest.mark.parametrize("t", [1, 8, 19], ids="prompt of {}".format)
def test_greedy_equals_transformers(twins, t):
    ids = twins.prompt(1, t)
    expected = hf_generate(twins, ids, max_new_tokens=30, eos_token_id=None)
    assert torch.equal(twins.model.generate(ids, max_new_tokens=30, **NEVER), expected[:, : t + 30])


@ALL_FAMILIES
def test_left_padded_batch_equals_transformers_and_single_prompts(twins):
    prompts, ids, mask = left_padded(twins, [11, 3, 20])
    out = twins.model.generate(ids, attention_mask=mask, max_new_tokens=16, **NEVER)
    expected = hf_generate(twins, ids, attention_mask=mask, max_new_tokens=16, eos_token_id=None)
    assert torch.equal(out, expected)
    for row, prompt in enumerate(prompts):
        alone = twins.model.generate(prompt, max_new_tokens=16, **NEVER)
        assert torch.equal(out[row, 20:], alone[0, prompt.shape[1] :])


@ALL_FAMILIES
def test_repetition_penalty_equals_transformers(twins):
    ids = twins.prompt(2, 6)
    options = {"max_new_tokens": 12, "repetition_penalty": 1.5}
    expected = hf_generate(twins, ids, eos_token_id=None, **options)
    assert torch.equal(twins.model.generate(ids, **options, **NEVER), expected)


@ALL_FAMILIES
def test_rows_are_padded_after_their_eos_token(twins):
    ids = twins.prompt(3, 6)
    free = twins.model.generate(ids, max_new_tokens=12, **NEVER)
    eos = [int(free[0, 8]), int(free[1, 10])]
    out = twins.model.generate(ids, max_new_tokens=12, eos_token_id=eos)
    expected = hf_generate(twins, ids, max_new_tokens=12, eos_token_id=eos)
    assert torch.equal(out, expected)
    assert (out[0, 9:] == 0).all()


def test_the_default_eos_token_is_from_the_config(twins, monkeypatch):
    ids = twins.prompt(1, 5)
    free = twins.model.generate(ids, max_new_tokens=6, **NEVER)
    config = replace(twins.config, eos_token_id=int(free[0, 7]))
    monkeypatch.setattr(twins.model, "config", config)
    monkeypatch.setattr(twins.model, "generation_config", {})
    end = 6 + free[0, 5:].tolist().index(config.eos_token_id)
    assert torch.equal(twins.model.generate(ids, max_new_tokens=6), free[:, :end])


def test_prompt_and_max_new_tokens_may_fill_the_context(twins):
    any_token = list(range(twins.config.vocab_size))
    out = twins.model.generate(twins.prompt(1, 5), max_new_tokens=251, eos_token_id=any_token)
    assert out.shape == (1, 6)


@ALL_FAMILIES
def test_prefill_in_chunks_gives_the_same_tokens(twins, monkeypatch):
    _, ids, mask = left_padded(twins, [30, 4])
    options = {"attention_mask": mask, "max_new_tokens": 8, **NEVER}
    expected = twins.model.generate(ids, **options)
    sizes, hidden_states = [], twins.model.hidden_states

    def spy(ids, *args, **kwargs):
        sizes.append(ids.shape[1])
        return hidden_states(ids, *args, **kwargs)

    monkeypatch.setattr(twins.model, "hidden_states", spy)
    monkeypatch.setattr(decoder, "PREFILL_CHUNK", 14)  # 7 tokens for each of the two rows
    assert torch.equal(twins.model.generate(ids, **options), expected)
    assert sizes == [7, 7, 7, 7, 2] + 7 * [1]


def test_the_same_seed_samples_the_same_text(twins):
    def draw(**kwargs):
        ids = twins.prompt(2, 5)
        return twins.model.generate(
            ids, do_sample=True, temperature=3.0, max_new_tokens=12, **NEVER, **kwargs
        )

    assert torch.equal(draw(seed=7), draw(seed=7))
    assert not torch.equal(draw(seed=7), draw(seed=8))
    torch.manual_seed(3)
    first = draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    torch.manual_seed(4)
    assert not torch.equal(draw(), first)
    greedy = twins.model.generate(twins.prompt(2, 5), max_new_tokens=12, **NEVER)
    for filters in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert torch.equal(draw(seed=7, **filters), greedy)


def test_a_stop_string_ends_its_row(twins):
    ids = twins.prompt(2, 5)
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 5.0, "seed": 0, **NEVER}
    free = twins.model.generate(ids, **options)
    stop = Letters().decode(free[0, 7:9].tolist())
    assert stop not in Letters().decode(free[1, 5:].tolist())
    out = twins.model.generate(ids, stop_strings=stop, tokenizer=Letters(), **options)
    assert torch.equal(out[0], torch.cat((free[0, :9], torch.zeros(8, dtype=torch.long))))
    assert torch.equal(out[1], free[1])
    with pytest.raises(ValueError, match=r"stop_strings=\['x'\].* needs tokenizer"):
        twins.model.generate(ids, max_new_tokens=2, stop_strings=["x"])


class Bytes:
    """Decodes each four ids to one character, like the four bytes of an emoji. Appends a dot."""

    def decode(self, ids) -> str:
        return Letters().decode(ids[len(ids) % 4 :: 4]) + "."


def test_a_stop_string_may_span_many_tokens(twins):
    ids = twins.prompt(1, 5)
    free = twins.model.generate(ids, max_new_tokens=16, **NEVER)
    stop = Bytes().decode(free[0, 5:13].tolist())[:2]
    out = twins.model.generate(
        ids, max_new_tokens=16, stop_strings=["?", stop], tokenizer=Bytes(), **NEVER
    )
    assert torch.equal(out, free[:, :13])


def test_the_repetition_penalty_applies_to_prompt_and_new_tokens(twins, monkeypatch):
    """The penalty does not apply to tokens of other rows or of earlier texts."""
    seen, process = [], Sampler._process

    def spy(self, logits):
        seen.append([set(row.nonzero().flatten().tolist()) for row in self._seen])
        return process(self, logits)

    monkeypatch.setattr(Sampler, "_process", spy)
    for seed in (0, 1):
        seen.clear()
        ids = twins.prompt(2, 5, seed)
        out = twins.model.generate(ids, max_new_tokens=4, repetition_penalty=1.2, **NEVER)
        assert seen == [[set(row[:t].tolist()) for row in out] for t in (5, 6, 7, 8)]


def test_a_stop_string_in_the_prompt_does_not_end_the_text(twins):
    ids = twins.prompt(1, 5)
    stop = Letters().decode(ids[0, 1:3].tolist())
    out = twins.model.generate(
        ids, max_new_tokens=3, stop_strings=[stop], tokenizer=Letters(), **NEVER
    )
    assert out.shape == (1, 8)


def test_a_streamer_gets_the_prompt_and_then_each_token(twins):
    ids, recorder = twins.prompt(1, 5), Recorder()
    out = twins.model.generate(ids, max_new_tokens=4, streamer=recorder, **NEVER)
    assert [p.shape for p in recorder.puts] == [(1, 5)] + 4 * [(1,)]
    assert torch.equal(torch.cat([p.flatten() for p in recorder.puts]), out[0])
    assert recorder.ended == 1


def test_a_streamer_gets_all_rows(twins):
    ids, recorder = twins.prompt(2, 5), Recorder()
    out = twins.model.generate(ids, max_new_tokens=3, streamer=recorder, **NEVER)
    assert torch.equal(torch.cat([p.view(2, -1) for p in recorder.puts], dim=1), out)


def test_end_is_called_after_a_streamer_raised(twins):
    class Broken(Recorder):
        def put(self, ids):
            raise OSError("pipe closed")

    recorder = Broken()
    with pytest.raises(OSError, match="pipe closed"):
        twins.model.generate(twins.prompt(1, 5), max_new_tokens=4, streamer=recorder)
    assert recorder.ended == 1


def test_pad_token_id_fills_finished_rows(twins):
    ids = twins.prompt(2, 6)
    free = twins.model.generate(ids, max_new_tokens=6, **NEVER)
    eos = int(free[0, 6])
    out = twins.model.generate(ids, max_new_tokens=6, eos_token_id=eos, pad_token_id=7)
    assert (out[0, 7:] == 7).all()


@pytest.mark.parametrize("after", [1, 2, 4], ids="after {} calls".format)
def test_ctrl_c_returns_the_tokens_so_far(twins, after):
    ids, recorder = twins.prompt(1, 5), Recorder(interrupt_after=after)
    free = twins.model.generate(ids, max_new_tokens=8, **NEVER)
    out = twins.model.generate(ids, max_new_tokens=8, streamer=recorder, **NEVER)
    assert torch.equal(out, free[:, : 5 + after - 1])
    assert recorder.ended == 1


def test_generation_config_gives_the_defaults(twins, monkeypatch):
    ids = twins.prompt(1, 5)
    free = twins.model.generate(ids, max_new_tokens=9, **NEVER)
    eos = int(free[0, 7])
    config = {"max_new_tokens": 9, "eos_token_id": [eos], "transformers_version": "5"}
    monkeypatch.setattr(twins.model, "generation_config", config)
    end = 6 + free[0, 5:].tolist().index(eos)
    assert torch.equal(twins.model.generate(ids), free[:, :end])
    assert torch.equal(twins.model.generate(ids, max_new_tokens=1), free[:, :6])
    monkeypatch.setitem(config, "do_sample", True)
    monkeypatch.setitem(config, "temperature", -1)
    with pytest.raises(ValueError, match="temperature=-1"):
        twins.model.generate(ids)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be"),
        ({"max_new_tokens": True}, "max_new_tokens=True must be"),
        ({"max_new_tokens": 252}, "prompt of 5 tokens and max_new_tokens=252 do not fit.* 256"),
        ({"max_new_tokens": 2, "do_sample": True, "top_p": 3}, "top_p=3"),
        ({"max_new_tokens": 2, "eos_token_id": "x"}, "eos_token_id='x'"),
        ({"max_new_tokens": 2, "eos_token_id": True}, "eos_token_id=True"),
        ({"max_new_tokens": 2, "eos_token_id": [1, 2.0]}, r"eos_token_id=\[1, 2.0\] must be integ"),
        ({"max_new_tokens": 2, "pad_token_id": "x"}, "pad_token_id='x' must be integers"),
        ({"max_new_tokens": 2, "pad_token_id": [0, 1]}, r"pad_token_id=\[0, 1\] must be one token"),
        ({"max_new_tokens": 2, "seed": "a"}, "seed='a' must be"),
        ({"max_new_tokens": 2, "seed": 10**30}, r"seed=10+ must be"),
        ({"max_new_tokens": 2, "stop_strings": ["a", ""]}, "must be non-empty strings"),
        ({"max_new_tokens": 2, "stop_strings": [5]}, r"stop_strings=\[5\]"),
        ({"max_new_tokens": 2, "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}, "on the left"),
        ({"max_new_tokens": 2, "attention_mask": torch.zeros(1, 5)}, "on the left"),
        ({"max_new_tokens": 2, "attention_mask": torch.tensor(1)}, r"shape \(1, 5\), not \(\)"),
        ({"max_new_tokens": 2, "attention_mask": torch.ones(1, 4)}, r"\(1, 5\), not \(1, 4\)"),
        ({"max_new_tokens": 2, "attention_mask": torch.tensor([[1, 0, 1, 1, 1]])}, "has holes"),
    ],
    ids=str,
)
def test_bad_arguments_raise(twins, kwargs, message):
    with pytest.raises(ValueError, match=message):
        twins.model.generate(twins.prompt(1, 5), **kwargs)


def test_an_unknown_keyword_raises(twins):
    with pytest.raises(TypeError, match="num_beams"):
        twins.model.generate(twins.prompt(1, 5), max_new_tokens=2, num_beams=4)
