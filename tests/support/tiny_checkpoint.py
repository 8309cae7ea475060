"""Writes the checkpoint of any tiny model, with the tokenizer of the tiny chat model."""

from dataclasses import replace
from pathlib import Path

from chat_checkpoint import write_chat_checkpoint
from tiny_models import CONFIGS, random_transformers_model
from tiny_tokenizer import tiny_backend

from gemma_fast.text.tokenizer import Tokenizer


def write_tiny_checkpoint(path: Path, name: str) -> Path:
    """name: one of CONFIGS, whose vocabulary becomes that of the tokenizer."""
    write_chat_checkpoint(path)
    vocab_size = Tokenizer(tiny_backend(), "tiny").backend.get_vocab_size()
    config = replace(CONFIGS[name], vocab_size=vocab_size, vocab_size_per_layer_input=None)
    random_transformers_model(config).save_pretrained(path)
    return path
