"""Lists keywords of transformers that are not implemented here. They are accepted with values that
change nothing, so that code for transformers needs only another import.

Each call has one table: keyword → the values that are accepted, and the advice in the error message
for any other value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class _Any:
    """A set of all values: used for keywords that cannot change the result."""

    def __contains__(self, value: object) -> bool:
        return True


Table = Mapping[str, tuple[Any, str]]
ANY = _Any()
_FROM_LOGITS = "compute the loss from the logits; the kernels have no backward"
_DOWNLOAD = "pass the path that huggingface_hub.snapshot_download(…) returns"
_ONE_TEXT = "each prompt gets one continuation: repeat the prompt in the batch to get several"
_LOOP = "call the model in a loop, with past_key_values, and sample from its logits"
_MINIMUM = "pass eos_token_id=[], so that no token ends a text"
_OUTPUTS = {
    "output_attentions": ((False,), "the kernels do not store attention weights"),
    "output_hidden_states": ((False,), "only logits are returned"),
}

FORWARD: Table = _OUTPUTS | {
    "return_dict": ((True,), "index the result: [0] is the logits, [1] the cache"),
    "labels": ((), _FROM_LOGITS),
    "inputs_embeds": ((), "pass input_ids"),
}
GENERATE: Table = _OUTPUTS | {
    "use_cache": (ANY, ""),
    "cache_implementation": (("dynamic", "static", "hybrid"), "there is only one kind of cache"),
    "disable_compile": (ANY, ""),
    "bos_token_id": (ANY, ""),
    "return_dict_in_generate": ((False,), "the result is the ids, prompt included"),
    "output_scores": ((False,), _LOOP),
    "output_logits": ((False,), _LOOP),
    "num_beams": ((1,), "use sampling or greedy search"),
    "num_return_sequences": ((1,), _ONE_TEXT),
    "early_stopping": ((False,), "it is an option of beam search, which is not supported"),
    "length_penalty": ((1.0,), "it is an option of beam search, which is not supported"),
    "min_length": ((0,), _MINIMUM),
    "min_new_tokens": ((0,), _MINIMUM),
    "no_repeat_ngram_size": ((0,), "use repetition_penalty"),
    "typical_p": ((1.0,), "use top_k, top_p or min_p"),
    "renormalize_logits": ((False,), _LOOP),
    "logits_processor": ((), _LOOP),
    "stopping_criteria": ((), "use stop_strings or eos_token_id"),
    "past_key_values": ((), _LOOP),
    "assistant_model": ((), "speculative decoding is not implemented: omit it"),
    "max_time": ((), "to end a text early, pass a streamer that raises KeyboardInterrupt"),
}
FROM_PRETRAINED: Table = {
    "attn_implementation": (
        ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"),
        "attention runs on this project's kernels; omit it",
    ),
    "low_cpu_mem_usage": (ANY, ""),
    "use_safetensors": ((True,), "pickles are not read: convert them to safetensors"),
    "trust_remote_code": ((False,), "a checkpoint's code is not run"),
    "quantization_config": ((), "quantized weights are read from .gguf files only"),
    "load_in_8bit": ((False,), "quantized weights are read from .gguf files only"),
    "load_in_4bit": ((False,), "quantized weights are read from .gguf files only"),
    "output_loading_info": ((False,), "missing and unexpected tensors raise ValueError"),
    "revision": (("main",), _DOWNLOAD),
    "token": ((), _DOWNLOAD + ", or run `hf auth login`"),
    "cache_dir": ((), _DOWNLOAD),
    "subfolder": (("",), _DOWNLOAD),
    "gguf_file": ((), "pass the path of the .gguf file itself"),
}
_AUTO_TOKENIZER = "use transformers.AutoTokenizer, whose tensors this model takes"
# Keys of tokenizer_config.json, and keywords of from_pretrained, that have no effect here. Those
# that have one are in text/settings.py.
TOKENIZER: Table = {
    "use_fast": ((True,), "there is no slow tokenizer: omit it"),
    "from_slow": ((False,), "there is no slow tokenizer: omit it"),
    "trust_remote_code": FROM_PRETRAINED["trust_remote_code"],
    "revision": FROM_PRETRAINED["revision"],
    "token": FROM_PRETRAINED["token"],
    "use_auth_token": FROM_PRETRAINED["token"],
    "cache_dir": FROM_PRETRAINED["cache_dir"],
    "subfolder": FROM_PRETRAINED["subfolder"],
    "gguf_file": FROM_PRETRAINED["gguf_file"],
    "force_download": ((False,), _DOWNLOAD),
    "proxies": ((), _DOWNLOAD),
    "local_files_only": ((True, False), "pass a bool"),
    "config": (ANY, ""),
    "tokenizer_type": (("gemma", "gemma2", "gemma3", "gemma3_text"), "only Gemma's is read"),
    "tokenizer_file": (ANY, ""),
    "vocab_file": (ANY, ""),
    "vocab": ((), "a tokenizer is read from files only"),
    "merges": ((), "a tokenizer is read from files only"),
    "merges_file": ((), "a tokenizer is read from tokenizer.json or tokenizer.model"),
    "tokenizer": ((), "a tokenizer is read from files only"),
    "tokenizer_object": ((), "a tokenizer is read from files only"),
    "post_processor": ((), "use add_bos_token and add_eos_token"),
    "tokenizer_padding": ((), "pass padding=… in each call"),
    "tokenizer_truncation": ((), "pass truncation=… in each call"),
    "split_special_tokens": ((False,), _AUTO_TOKENIZER),
    "fix_mistral_regex": ((False,), "it is an option of Mistral's tokenizer"),
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": (
        (False,),
        _AUTO_TOKENIZER,
    ),
    "init_inputs": ((), _AUTO_TOKENIZER),
    "mistral_format": ((False,), "it is an option of Mistral's tokenizer"),
    # transformers' Gemma tokenizer ignores the keys from here on, too.
    "add_prefix_space": (ANY, ""),
    "auto_map": (ANY, ""),
    "backend": (ANY, ""),
    "code_revision": (ANY, ""),
    "clean_up_tokenization_spaces": (ANY, ""),
    "files_loaded": (ANY, ""),
    "is_local": (ANY, ""),
    "legacy": (ANY, ""),
    "max_length": (ANY, ""),
    "name_or_path": (ANY, ""),
    "pad_to_multiple_of": (ANY, ""),
    "pad_token_type_id": (ANY, ""),
    "processor_class": (ANY, ""),
    "response_schema": (ANY, ""),
    "response_template": (ANY, ""),
    "sp_model_kwargs": (ANY, ""),
    "spaces_between_special_tokens": (ANY, ""),
    "special_tokens_map_file": (ANY, ""),
    "stride": (ANY, ""),
    "truncation_strategy": (ANY, ""),
    "unk_id": (ANY, ""),
    "use_default_system_prompt": (ANY, ""),
    "verbose": (ANY, ""),
}
# Keywords of tokenizer(text).
TOKENIZER_CALL: Table = {
    "is_split_into_words": ((False,), "join the words to a text"),
    "return_overflowing_tokens": ((False,), "split the ids that the call without it returns"),
    "split_special_tokens": ((False,), _AUTO_TOKENIZER),
    "text_pair_target": ((), "call the tokenizer a second time"),
    "max_target_length": ((), "call the tokenizer a second time"),
    "clean_up_tokenization_spaces": (ANY, ""),
    "sanitize_control_tokens": ((False,), "apply_chat_template always does so"),
    "verbose": (ANY, ""),
    "stride": (ANY, ""),
}
DECODE: Table = {
    "clean_up_tokenization_spaces": (ANY, ""),  # transformers ignores it for a BPE
    "spaces_between_special_tokens": (ANY, ""),
    "use_source_tokenizer": (ANY, ""),
}
_FILES = f"copy the checkpoint's files, or {_AUTO_TOKENIZER}"
_CALL = "call the tokenizer itself: tokenizer(text, …)"
_PARSE = f"decode the ids and parse the text, or {_AUTO_TOKENIZER}"
# Attributes of transformers' tokenizers that ours does not have.
TOKENIZER_ATTRIBUTES: Mapping[str, str] = {
    "SPECIAL_TOKENS_ATTRIBUTES": "see special_tokens_map",
    "add_prefix_space": "Gemma adds no space in front of a text",
    "batch_encode_plus": _CALL,
    "build_inputs_with_special_tokens": _CALL,
    "can_save_slow_tokenizer": "there is no slow tokenizer",
    "clean_up_tokenization": "transformers does not apply it to Gemma's texts",
    "convert_added_tokens": _FILES,
    "convert_to_native_format": _FILES,
    "create_token_type_ids_from_sequences": "pass return_token_type_ids=True",
    "deprecation_warnings": "use the module warnings",
    "encode_message_with_chat_template": "use apply_chat_template, and compare the ids",
    "encode_plus": _CALL,
    "files_loaded": "see source",
    "model": "see backend.model",
    "get_response_parser": _PARSE,
    "parse_response": _PARSE,
    "prepare_for_model": _CALL,
    "prepare_seq2seq_batch": _CALL,
    "pretrained_vocab_files_map": "see source",
    "push_to_hub": _FILES,
    "register_for_auto_class": _AUTO_TOKENIZER,
    "response_template": _PARSE,
    "sanitize_special_tokens": "use add_special_tokens",
    "save_chat_templates": _FILES,
    "save_pretrained": _FILES,
    "save_vocabulary": _FILES,
    "set_truncation_and_padding": "pass truncation=… and padding=… in each call",
    "slow_tokenizer_class": "there is no slow tokenizer",
    "train_new_from_iterator": _AUTO_TOKENIZER,
    "truncate_sequences": "pass truncation=True and max_length=…",
    "update_post_processor": "set add_bos_token or add_eos_token",
    "vocab_files_names": "see source",
}


def check_keywords(call: str, given: Mapping[str, Any], table: Table) -> None:
    """Raises TypeError for a keyword that is not in the table, or whose value is not in the table.
    None, [] and {} are accepted for every keyword of the table."""
    for name, value in given.items():
        if name not in table:
            raise TypeError(f"{call} got an unexpected keyword argument {name!r}")
        same, way_out = table[name]
        if isinstance(value, list | tuple | dict) and not value:
            continue
        if value is not None and not (value in same if isinstance(value, _PLAIN) else same is ANY):
            raise TypeError(f"{call}: {name}={value!r:.60} is not supported: {way_out}")


_PLAIN = (bool, int, float, str)
