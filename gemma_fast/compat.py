"""transformers' keywords that are accepted but change nothing, so that callers change one import.

One table per call: keyword → the values that ask for what is done anyway, and advice for others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class _Any:
    """Contains every value: for keywords that cannot change the result."""

    def __contains__(self, value: object) -> bool:
        return True


Table = Mapping[str, tuple[Any, str]]
ANY = _Any()
_FROM_LOGITS = "compute it from the logits; the kernels have no backward"
_DOWNLOAD = "pass the path that huggingface_hub.snapshot_download(…) gives"
_ONE_TEXT = "a row is one text: repeat the prompt's rows for several"
_LOOP = "call the model in a loop, with past_key_values, and choose from its logits"
_MINIMUM = "pass eos_token_id=[] to let no token end a text"
_OUTPUTS = {
    "output_attentions": ((False,), "the kernels write none"),
    "output_hidden_states": ((False,), "only logits are returned"),
}

FORWARD: Table = _OUTPUTS | {
    "return_dict": ((True,), "index the result: [0] is the logits, [1] the cache"),
    "labels": ((), _FROM_LOGITS),
    "inputs_embeds": ((), "pass input_ids"),
}
GENERATE: Table = _OUTPUTS | {
    "use_cache": (ANY, ""),
    "cache_implementation": (("dynamic", "static", "hybrid"), "the cache is of one kind"),
    "disable_compile": (ANY, ""),
    "bos_token_id": (ANY, ""),
    "return_dict_in_generate": ((False,), "the result is the ids, prompt included"),
    "output_scores": ((False,), _LOOP),
    "output_logits": ((False,), _LOOP),
    "num_beams": ((1,), "sampling and greedy search are there"),
    "num_return_sequences": ((1,), _ONE_TEXT),
    "early_stopping": ((False,), "it belongs to beam search"),
    "length_penalty": ((1.0,), "it belongs to beam search"),
    "min_length": ((0,), _MINIMUM),
    "min_new_tokens": ((0,), _MINIMUM),
    "no_repeat_ngram_size": ((0,), "repetition_penalty is there"),
    "typical_p": ((1.0,), "top_k, top_p and min_p are there"),
    "renormalize_logits": ((False,), _LOOP),
    "logits_processor": ((), _LOOP),
    "stopping_criteria": ((), "stop_strings and eos_token_id are there"),
    "past_key_values": ((), _LOOP),
    "assistant_model": ((), "speculative decoding is not"),
    "max_time": ((), "a streamer may raise KeyboardInterrupt, which ends the text"),
}
FROM_PRETRAINED: Table = {
    "attn_implementation": (
        ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"),
        "attention runs on this project's kernels, which compute what these do",
    ),
    "low_cpu_mem_usage": (ANY, ""),
    "use_safetensors": ((True,), "pickles are not read"),
    "trust_remote_code": ((False,), "a checkpoint's code is not run"),
    "quantization_config": ((), "only .gguf files are read quantized"),
    "load_in_8bit": ((False,), "only .gguf files are read quantized"),
    "load_in_4bit": ((False,), "only .gguf files are read quantized"),
    "output_loading_info": ((False,), "a tensor missing or too many is an error"),
    "revision": (("main",), _DOWNLOAD),
    "token": ((), _DOWNLOAD + ", or run `hf auth login`"),
    "cache_dir": ((), _DOWNLOAD),
    "subfolder": (("",), _DOWNLOAD),
    "gguf_file": ((), "pass the path of the .gguf itself"),
}
TOKENIZER: Table = {
    "padding_side": (
        ("left",),
        "prompts are padded on the left, so that they end where text begins",
    ),
    "use_fast": ((True,), "there is only the one on the package tokenizers"),
    "trust_remote_code": FROM_PRETRAINED["trust_remote_code"],
    "revision": FROM_PRETRAINED["revision"],
    "token": FROM_PRETRAINED["token"],
}


def check_keywords(call: str, given: Mapping[str, Any], table: Table) -> None:
    """TypeError, with the keyword, if it is not in the table or its value is not supported. None is
    always accepted."""
    for name, value in given.items():
        if name not in table:
            raise TypeError(f"{call} got an unexpected keyword argument {name!r}")
        same, way_out = table[name]
        if value is not None and not (value in same if isinstance(value, _PLAIN) else same is ANY):
            raise TypeError(f"{call}: {name}={value!r:.60} is not supported: {way_out}")


_PLAIN = (bool, int, float, str)
