"""Fixtures: tiny random chat models, and servers with them."""

import pytest
from chat_checkpoint import write_chat_checkpoint
from http_server import running

from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.text.tokenizer import Tokenizer


def load(path):
    model = GemmaForCausalLM.from_pretrained(path, device="cpu", dtype="float32")
    return model, Tokenizer.from_pretrained(path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Returns model and tokenizer of a Gemma 3 with random weights."""
    return load(write_chat_checkpoint(tmp_path_factory.mktemp("chat")))


@pytest.fixture(scope="session")
def tiny4(tmp_path_factory):
    """Returns model and tokenizer of a Gemma 4, whose template has thoughts and tools."""
    return load(write_chat_checkpoint(tmp_path_factory.mktemp("chat4"), "gemma4"))


@pytest.fixture(scope="module")
def server(tiny):
    with running(*tiny) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return server.client()
