"""Lists settings, keywords and attributes that transformers' tokenizers have and this one lacks.

SETTINGS, CALL and DECODE: keyword → the values that are accepted because they change nothing, and
the advice in the error message for any other value. ATTRIBUTES: name → the advice.
"""

from collections.abc import Mapping

from gemma_fast.compat import ANY, DOWNLOAD, FROM_PRETRAINED, Table

_AUTO_TOKENIZER = "use transformers.AutoTokenizer, whose tensors this model takes"
# Keywords of from_pretrained that are not keys of tokenizer_config.json.
LOADING: Table = {
    "use_fast": ((True,), "there is no slow tokenizer: omit it"),
    "from_slow": ((False,), "there is no slow tokenizer: omit it"),
    "trust_remote_code": FROM_PRETRAINED["trust_remote_code"],
    "subfolder": FROM_PRETRAINED["subfolder"],
    "gguf_file": FROM_PRETRAINED["gguf_file"],
    "proxies": FROM_PRETRAINED["proxies"],
    "use_auth_token": FROM_PRETRAINED["use_auth_token"],
    **dict.fromkeys(DOWNLOAD, (ANY, "")),
    # These three are keywords of a model, which programs pass to the tokenizer, too.
    "device_map": (ANY, ""),
    "dtype": (ANY, ""),
    "torch_dtype": (ANY, ""),
    "config": (ANY, ""),
    "tokenizer_type": (("gemma", "gemma2", "gemma3", "gemma3_text"), "only Gemma's is read"),
}
# Keys of tokenizer_config.json, and keywords of from_pretrained, without effect or refused. Those
# that are applied are in settings.py.
SETTINGS: Table = {
    **LOADING,
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
CALL: Table = {
    "is_split_into_words": ((False,), "join the words into a text"),
    "return_overflowing_tokens": ((False,), "split the ids that the call without it returns"),
    "split_special_tokens": ((False,), _AUTO_TOKENIZER),
    "text_pair_target": ((), "call the tokenizer a second time"),
    "max_target_length": ((), "call the tokenizer a second time"),
    "clean_up_tokenization_spaces": (ANY, ""),
    "sanitize_control_tokens": ((False,), "pass it to apply_chat_template"),
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
_PARSE = f"gemma_fast.split_thoughts separates thoughts and answer; for calls, {_AUTO_TOKENIZER}"
# Attributes of transformers' tokenizers that ours does not have.
ATTRIBUTES: Mapping[str, str] = {
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
