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
