"""Reads the tokenizer's settings from a GGUF file's metadata, as llama.cpp does.

Source: llama_vocab::impl::load in src/llama-vocab.cpp, and the keys in src/llama-arch.cpp.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as Backend

from gemma_fast.text.templates import gguf_templates

PREFIX = "tokenizer."
TOKEN_IDS = {  # key, which stores a token id → name of the token
    "ggml.bos_token_id": "bos_token",
    "ggml.eos_token_id": "eos_token",
    "ggml.unknown_token_id": "unk_token",
    "ggml.padding_token_id": "pad_token",
    "ggml.mask_token_id": "mask_token",
    "ggml.seperator_token_id": "sep_token",
    "ggml.cls_token_id": "cls_token",
}
ENDS = (  # other tokens that end a text
    "ggml.eot_token_id", "ggml.eom_token_id", "ggml.fim_pad_token_id", "ggml.fim_rep_token_id",
    "ggml.fim_sep_token_id",
)  # fmt: skip
FLAGS = ("ggml.add_bos_token", "ggml.add_eos_token")
# ggml.scores and ggml.add_space_prefix have no effect for Gemma 4, ggml.merges have none before.
READ = (
    "ggml.model", "ggml.tokens", "ggml.scores", "ggml.merges", "ggml.token_type",
    "ggml.add_space_prefix", "chat_template",
)  # fmt: skip
# llama.cpp does not read these for Gemma's vocabularies, or does not need them for text.
# suppress_tokens are a setting of generation.
NO_EFFECT = (
    "ggml.pre", "ggml.token_type_count", "ggml.add_sep_token",
    "ggml.remove_extra_whitespaces", "ggml.precompiled_charsmap", "ggml.fim_pre_token_id",
    "ggml.fim_suf_token_id", "ggml.fim_mid_token_id", "ggml.prefix_token_id",
    "ggml.suffix_token_id", "ggml.middle_token_id", "ggml.suppress_tokens",
    "ggml.normalizer.lowercase", "huggingface.json", "rwkv.world", "chat_templates",
)  # fmt: skip
KNOWN = {*TOKEN_IDS, *ENDS, *FLAGS, *READ, *NO_EFFECT}
# Gemma 4's special tokens, by their names in its tokenizer_config.json, which GGUF does not store.
# llama.cpp's converter marks some of them as user-defined, so that its parsers see them.
GEMMA_4_TOKENS = {
    "sot_token": "<|turn>", "eot_token": "<turn|>", "soc_token": "<|channel>",
    "eoc_token": "<channel|>", "think_token": "<|think|>", "escape_token": '<|"|>',
    "std_token": "<|tool>", "etd_token": "<tool|>", "stc_token": "<|tool_call>",
    "etc_token": "<tool_call|>", "str_token": "<|tool_response>", "etr_token": "<tool_response|>",
    "boi_token": "<|image>", "image_token": "<|image|>", "eoi_token": "<image|>",
    "boa_token": "<|audio>", "audio_token": "<|audio|>", "eoa_token": "<audio|>",
    "video_token": "<|video|>",
}  # fmt: skip


def gguf_settings(metadata: Mapping[str, Any], backend: Backend, source: str) -> dict[str, Any]:
    """Returns the settings under the names of tokenizer_config.json, and `end_tokens`.

    Warns of an unknown key, of an id outside the vocabulary, which llama.cpp ignores, too, of a
    file without add_space_prefix, and of a Gemma 4 without add_bos_token.
    Raises ValueError for a value of another type, and for add_space_prefix.
    """
    keys = {k.removeprefix(PREFIX): v for k, v in metadata.items() if k.startswith(PREFIX)}
    for key in keys:
        if key not in KNOWN and not key.startswith("chat_template."):
            warnings.warn(
                f"{source}: the key {PREFIX}{key} is unknown and has no effect", stacklevel=2
            )
    gemma_4 = keys.get("ggml.model") == "gemma4"
    if keys.get("ggml.add_space_prefix") and not gemma_4:
        raise ValueError(
            f"{source}: tokenizer.ggml.add_space_prefix is true, but Gemma adds no space in front"
            " of a text: convert the model again with llama.cpp's convert_hf_to_gguf.py"
        )
    if "ggml.add_space_prefix" not in keys and not gemma_4:
        warnings.warn(
            f"{source} has no tokenizer.ggml.add_space_prefix, so llama.cpp adds a space in front"
            " of each text. Gemma's tokenizer does not, and none is added here",
            stacklevel=2,
        )
    settings: dict[str, Any] = {"add_bos_token": True, "add_eos_token": False}
    for key in FLAGS:
        if key in keys:
            if not isinstance(keys[key], bool):
                raise ValueError(f"{source}: {PREFIX}{key} must be true or false, not {keys[key]}")
            settings[key.removeprefix("ggml.")] = keys[key]
    if gemma_4:
        settings |= _gemma_4(settings, backend, source)
    for key, name in TOKEN_IDS.items():
        if token := _token(keys, key, backend, source):
            settings[name] = token
    ends = [_token(keys, key, backend, source) for key in ENDS]
    settings["end_tokens"] = [token for token in ends if token]
    settings["chat_template"] = gguf_templates(metadata, source)
    return settings


def _gemma_4(settings: Mapping[str, Any], backend: Backend, source: str) -> dict[str, Any]:
    """Returns the names of the special tokens, and add_bos_token=True. llama.cpp sets it for every
    Gemma 4, because a file may say false (its chat template writes <bos>), but texts need <bos>."""
    if not settings["add_bos_token"]:
        warnings.warn(
            f"{source}: tokenizer.ggml.add_bos_token is false, but Gemma 4 needs <bos>: it is added"
            " to each text, as in llama.cpp",
            stacklevel=3,
        )
    tokens = {n: t for n, t in GEMMA_4_TOKENS.items() if backend.token_to_id(t) is not None}
    return {"add_bos_token": True, "model_specific_special_tokens": tokens}


def _token(keys: Mapping[str, Any], key: str, backend: Backend, source: str) -> str | None:
    value = keys.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{source}: {PREFIX}{key} must be an id, not {value!r:.60}")
    token = backend.id_to_token(value) if 0 <= value < 1 << 32 else None
    if token is None:
        warnings.warn(
            f"{source}: {PREFIX}{key} is {value}, which is not in the vocabulary: ignored",
            stacklevel=3,
        )
    return token
