"""Tests that programs for transformers' Gemma give the same results if they import gemma_fast."""

import io
import re
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from queue import Empty

import pytest
import torch
from chat_checkpoint import write_chat_checkpoint
from marks import slow
from model_cards import EXAMPLES, PRINT_STREAM
from tiny_models import TOLERANCE

from gemma_fast import GemmaForCausalLM, TextIteratorStreamer, Tokenizer

MODELS = re.compile(r"\w+ForCausalLM")
IMPORT = re.compile(r"^from transformers import (.*)$", re.MULTILINE)


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    """Hides the GPU, which gemma_fast would use by default and transformers would not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module", params=["gemma3", *slow("gemma", "gemma2")])
def checkpoint(request, tmp_path_factory) -> Path:
    return write_chat_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


def theirs(names: str) -> str:
    return f"from transformers import {names}"


def with_our_model(names: str) -> str:
    """Returns a line that imports the model from gemma_fast, everything else from transformers."""
    ours = [name for name in names.split(", ") if MODELS.match(name)]
    others = [name for name in names.split(", ") if not MODELS.match(name)]
    return f"from transformers import {', '.join(others)}; from gemma_fast import {', '.join(ours)}"


def all_ours(names: str) -> str:
    return f"from gemma_fast import {names}"


def run(program: str, change, path: Path) -> tuple[object, str]:
    """Runs a program after `change` has rewritten its import line. Returns its variable `result`
    and the printed text."""
    program = IMPORT.sub(lambda line: change(line[1]), program)
    scope, printed = {"PATH": str(path)}, io.StringIO()
    with redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(program, scope)
    return scope["result"], printed.getvalue()


def same(actual, expected) -> None:
    if isinstance(expected, tuple | list):
        assert len(actual) == len(expected)
        for pair in zip(actual, expected, strict=True):
            same(*pair)
    elif isinstance(expected, torch.Tensor) and expected.is_floating_point():
        torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected)
    else:
        assert actual == expected


@pytest.mark.parametrize("change", [with_our_model, all_ours])
@pytest.mark.parametrize("name", EXAMPLES, ids=str)
def test_programs_give_the_same_result(name, change, checkpoint):
    if name == "chats" and not checkpoint.name.startswith("gemma3"):
        pytest.skip("the older templates support neither message parts nor a system turn")
    program = EXAMPLES[name]
    assert len(IMPORT.findall(program)) == 1
    same(run(program, change, checkpoint), run(program, theirs, checkpoint))


@pytest.mark.parametrize("change", [with_our_model, all_ours])
def test_streamed_text_is_the_same(change, checkpoint):
    ids, printed = run(PRINT_STREAM, change, checkpoint)
    expected_ids, expected = run(PRINT_STREAM, theirs, checkpoint)
    assert torch.equal(ids, expected_ids)
    assert expected.strip()
    assert printed == expected


def test_failed_generation_ends_its_stream(checkpoint):
    model, tokenizer = (x.from_pretrained(checkpoint) for x in (GemmaForCausalLM, Tokenizer))
    model.norm.fill_(torch.nan)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    inputs = tokenizer("hello", return_tensors="pt")
    with pytest.raises(ValueError, match="not finite"):
        model.generate(**inputs, max_new_tokens=5, streamer=streamer)
    assert list(streamer) == []
    with pytest.raises(Empty):
        next(TextIteratorStreamer(tokenizer, timeout=0.01))
