"""Writes the checkpoint of a tiny random chat model: weights, tokenizer, official template. Gemma 4
has the template of tiny_gemma4.py."""

from dataclasses import replace
from pathlib import Path

import tiny_gemma4
from chat_templates import OFFICIAL
from tiny_models import CONFIGS, random_transformers_model
from tiny_tokenizer import tiny_backend
from transformers import PreTrainedTokenizerFast

from gemma_fast.text.tokenizer import Tokenizer

FAMILIES = {
    "gemma": "gemma-mqa", "gemma2": "gemma2-gqa", "gemma3": "gemma3-gqa", "gemma4": "gemma4-shared",
    "gemma4-experts": "gemma4-experts",
}  # fmt: skip


def write_chat_checkpoint(path: Path, family: str = "gemma3") -> Path:
    gemma4 = family.startswith("gemma4")
    if gemma4:
        backend = tiny_gemma4.tiny_backend()
        tiny_gemma4.write_tokenizer(path)
    else:
        backend = Tokenizer(tiny_backend(family), "tiny").backend
    config = replace(CONFIGS[FAMILIES[family]], vocab_size=backend.get_vocab_size())
    random_transformers_model(config).save_pretrained(path)
    if gemma4:
        return path
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        unk_token="<unk>", padding_side="left", model_input_names=["input_ids", "attention_mask"],
        chat_template=OFFICIAL[family],
    ).save_pretrained(path)  # fmt: skip
    return path
