"""Compares stop strings with transformers: they end in a new token, and may begin in the prompt."""

import pytest
import torch
import transformers
from chat_checkpoint import write_chat_checkpoint

from gemma_fast import GemmaForCausalLM

TEXTS = ["hello the world", "in the thinner world hello", "a b"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Returns transformers' model, our model, and transformers' tokenizer."""
    path = write_chat_checkpoint(tmp_path_factory.mktemp("stop"))
    hf = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    ours = GemmaForCausalLM.from_pretrained(path, device="cpu")
    return hf, ours, transformers.AutoTokenizer.from_pretrained(path)


def texts(models, stop, new=8):
    hf, ours, tokenizer = models
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
    options = {"max_new_tokens": new, "do_sample": False}
    if stop:
        options |= {"stop_strings": stop, "tokenizer": tokenizer}
    return [model.generate(**inputs, **options) for model in (hf, ours)]


@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize(("row", "count"), [(0, 1), (0, 2), (1, 1)])
def test_a_stop_string_that_begins_in_the_prompt_ends_the_text(models, row, before, count):
    tokenizer = models[2]
    free, _ = texts(models, None)
    start = free.shape[1] - 8
    prompt, whole = (tokenizer.decode(free[row, :end]) for end in (start, start + count))
    stop = whole[len(prompt) - before :]
    theirs, ours = texts(models, [stop, "never"])
    assert torch.equal(ours, theirs) and not torch.equal(theirs, free)


@pytest.mark.parametrize("stop", ["the", "hello", " w", "e", ["lo", "zzz"], "<bos>", "d", "\n"])
def test_a_stop_string_within_the_prompt_does_not_end_the_text(models, stop):
    theirs, ours = texts(models, stop)
    assert torch.equal(ours, theirs)
