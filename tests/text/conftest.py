"""Defines fixtures that load the tokenizer of a module's fixture `path`: with this project (ours),
and with transformers (judge)."""

import pytest
import transformers

from gemma_fast.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def ours(path) -> Tokenizer:
    return Tokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def judge(path):
    return transformers.AutoTokenizer.from_pretrained(path)
