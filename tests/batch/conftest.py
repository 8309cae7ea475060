"""Fixtures of the batch tests: a tiny random chat model, and a job with it."""

import json
from pathlib import Path

import pytest
from chat_checkpoint import write_chat_checkpoint

from gemma_fast.batch.job import Job
from gemma_fast.batch.local import answers_of
from gemma_fast.batch.rows import Numbered
from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return write_chat_checkpoint(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def model(checkpoint) -> GemmaForCausalLM:
    return GemmaForCausalLM.from_pretrained(checkpoint, device="cpu")


@pytest.fixture(scope="session")
def tokenizer(checkpoint) -> Tokenizer:
    return Tokenizer.from_pretrained(checkpoint)


@pytest.fixture
def answer(model, tokenizer, checkpoint):
    """Returns a function from rows and fields of the job to the answers, in the order of rows."""

    def run(rows, *, options=None, **fields) -> list[dict]:
        job = Job(model=str(checkpoint), options={"max_new_tokens": 6, **(options or {})}, **fields)
        numbered = [Numbered(number, row) for number, row in enumerate(rows)]
        found = [*answers_of(model, tokenizer, job, numbered)]
        return sorted(found, key=lambda x: x["row"])

    return run


@pytest.fixture
def write_rows(tmp_path):
    """Returns a function that writes rows, or lines as they are, to a file."""

    def write(rows, name: str = "prompts.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    return write
