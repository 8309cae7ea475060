"""Lists keywords of transformers that are not implemented here. They are accepted with values that
change nothing, so that code for transformers needs only another import.

Each call has one table: keyword → the values that are accepted, and the advice in the error message
for any other value.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any


class _Any:
    """A set of all values: used for keywords that cannot change the result."""

    def __contains__(self, value: object) -> bool:
        return True


Table = Mapping[str, tuple[Any, str]]
ANY = _Any()
_FROM_LOGITS = "compute the loss from the logits; the kernels have no backward"
_DOWNLOAD = "pass the path that huggingface_hub.snapshot_download(…) returns"
_ADAPTER = "merge the adapter with peft: model.merge_and_unload().save_pretrained(…)"
_OUTPUTS = {
    "output_attentions": ((False,), "the kernels do not store attention weights"),
    "output_hidden_states": ((False,), "only logits are returned"),
    "output_router_logits": ((False,), "only logits are returned"),
}

# Outputs of transformers' multimodal processors, which programs pass to forward() and generate().
_MEDIA: Table = {
    **dict.fromkeys(
        ("pixel_values", "pixel_values_videos", "image_position_ids", "video_position_ids",
         "input_features", "input_features_mask"),
        ((), "images, video and audio are not read: use transformers' own model and"
             " gemma_fast.hf.accelerate(model)"),
    ),
}  # fmt: skip

FORWARD: Table = {
    **_OUTPUTS,
    **_MEDIA,
    "return_dict": ((True,), "index the result: [0] is the logits, [1] the cache"),
    "labels": ((), _FROM_LOGITS),
    "inputs_embeds": ((), "pass input_ids"),
    "per_layer_inputs": ((), "pass input_ids"),
    # no effect on Gemma's text models in transformers 5
    "token_type_ids": (ANY, ""),
    "mm_token_type_ids": (ANY, ""),  # from the processors of Gemma 4, for texts as well
    "cache_position": (ANY, ""),
    "num_logits_to_keep": (ANY, ""),
}

# The fields of transformers' GenerationConfig: each one is in APPLIED, NO_EFFECT or REFUSED.
APPLIED = (
    "max_new_tokens", "max_length", "min_new_tokens", "min_length", "max_time", "eos_token_id",
    "pad_token_id", "stop_strings", "do_sample", "temperature", "top_k", "top_p", "min_p",
    "repetition_penalty", "no_repeat_ngram_size", "sequence_bias", "bad_words_ids",
    "suppress_tokens", "begin_suppress_tokens", "num_return_sequences", "return_dict_in_generate",
    "output_scores", "output_logits",
)  # fmt: skip
NO_EFFECT = (
    # speed and memory only
    "use_cache", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory",
    "compile_config", "disable_compile", "continuous_batching_config",
    # options of beam search, and of a second model that drafts tokens
    "early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty", "is_assistant",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type",
    "max_matching_ngram_size",
    # adds one constant to all logits of a token; logits that are not finite raise an error here
    "renormalize_logits", "remove_invalid_values",
    # for encoder-decoder models, and for calls without a prompt; metadata
    "decoder_start_token_id", "bos_token_id", "transformers_version", "_from_model_config",
    "_commit_hash",
)  # fmt: skip
_HF = "generate with transformers' own model and gemma_fast.hf.accelerate(model)"
_LOOP = "call model(ids, past_key_values=…) in a loop, and sample from its logits"
_DRAFT = f"it changes only the speed: omit it, or {_HF}"
_FILTER = f"use top_k, top_p or min_p, or {_HF}"
_PROCESSOR = f"pass a logits_processor, or {_HF}"
REFUSED: Table = {
    "num_beams": ((1,), f"use sampling or greedy search, or {_HF}"),
    "constraints": ((), _HF),
    "force_words_ids": ((), _HF),
    "penalty_alpha": ((0,), _HF),
    "dola_layers": ((), _HF),
    "guidance_scale": ((1,), _HF),
    "watermarking_config": ((), _HF),
    "token_healing": ((False,), _HF),
    "prompt_lookup_num_tokens": ((), _DRAFT),
    "assistant_early_exit": ((), _DRAFT),
    "use_mtp": ((False,), _DRAFT),
    "typical_p": ((1,), _FILTER),
    "epsilon_cutoff": ((0,), _FILTER),
    "eta_cutoff": ((0,), _FILTER),
    "top_h": ((), _FILTER),
    "encoder_repetition_penalty": ((1,), f"use repetition_penalty, or {_HF}"),
    "encoder_no_repeat_ngram_size": ((0,), f"use no_repeat_ngram_size, or {_HF}"),
    "exponential_decay_length_penalty": ((), _PROCESSOR),
    "forced_bos_token_id": ((), _PROCESSOR),
    "forced_eos_token_id": ((), _PROCESSOR),
    "cache_implementation": (
        ("dynamic", "static", "hybrid", "sliding_window", "hybrid_chunked"),
        f"omit it, because there is only one kind of cache, or {_HF}",
    ),
    "output_attentions": ((False,), _HF),
    "output_hidden_states": ((False,), _HF),
}
GENERATION_CONFIG: Table = {**REFUSED, **dict.fromkeys(APPLIED + NO_EFFECT, (ANY, ""))}
# Options for one row of ids per prompt, whatever the generation_config of the model says.
ONE_TEXT: Mapping[str, Any] = {"num_return_sequences": 1, "return_dict_in_generate": False}
# The keywords of transformers' generate(): the fields of its GenerationConfig, and others.
GENERATE: Table = {
    **GENERATION_CONFIG,
    **_MEDIA,
    "past_key_values": ((), f"{_LOOP}, or {_HF}"),
    "cache": ((), f"{_LOOP}, or {_HF}"),
    "output_router_logits": ((False,), _HF),
    "inputs_embeds": ((), f"pass input_ids, or {_HF}"),
    "position_ids": ((), "omit it: positions follow from attention_mask"),
    "token_type_ids": ((), "pass only input_ids and attention_mask"),
    "mm_token_type_ids": ((), "pass only input_ids and attention_mask"),
    "assistant_model": ((), _DRAFT),
    "assistant_tokenizer": ((), _DRAFT),
    "negative_prompt_ids": ((), _HF),
    "negative_prompt_attention_mask": ((), _HF),
    "custom_generate": ((), _HF),
    "synced_gpus": ((False,), "omit it: the model is on one device"),
    "trust_remote_code": (ANY, ""),
    "logits_to_keep": (ANY, ""),  # generate() needs the logits of the last token only
}
# Keywords of generate() and forward() that have a parameter there; a suggestion may name them.
PARAMETERS = ("input_ids", "attention_mask", "tokenizer", "streamer", "generation_config", "seed")
_TRANSFORMERS = "use transformers' own model and gemma_fast.hf.accelerate(model)"
# Attributes of transformers' models that do not exist here → advice in the error message.
ATTRIBUTES = {
    "save_pretrained": "the weights do not change: copy the checkpoint's directory",
    "push_to_hub": "the weights do not change: upload the checkpoint's directory",
    "model": "GemmaForCausalLM is the model: embed_tokens, layers and norm are its attributes",
    "get_input_embeddings": "embed_tokens is the embedding's weight :: [vocab, hidden]",
    "get_output_embeddings": "output_weight is the weight of the head :: [vocab, hidden]",
    "set_input_embeddings": f"the weights are frozen: {_TRANSFORMERS}",
    "resize_token_embeddings": f"resize transformers' model, and pass it to from_transformers, or"
    f" {_TRANSFORMERS}",
    "compute_transition_scores": "gather log_softmax(scores) at the new tokens of sequences",
    "prepare_inputs_for_generation": "call generate(), or model(ids, past_key_values=…) in a loop",
    "gradient_checkpointing_enable": f"the kernels have no backward: {_TRANSFORMERS}",
    "enable_input_require_grads": f"the kernels have no backward: {_TRANSFORMERS}",
    "set_attn_implementation": "omit it: attention runs on this project's kernels",
    "load_adapter": _ADAPTER,
    "add_adapter": _ADAPTER,
    "name_or_path": "it is the path that from_pretrained got",
    "hf_device_map": "the model is on one device: see device",
}
# Keywords of from_pretrained that are passed on to huggingface_hub. They have no effect on a path.
DOWNLOAD = ("revision", "token", "cache_dir", "force_download", "local_files_only")
_ONE_DEVICE = "omit it: the model runs on one device, see device"
QUANTIZE = ("int8", "int4", "none")  # values of from_pretrained's quantize, besides None
QUANTIZE_HELP = (
    "int8, int4: pack weights that have more bits; none: unpack quantized weights."
    " [default: as in the checkpoint]"
)
_GPTQ = "GPTQ is not read: use a GGUF or compressed-tensors checkpoint, or pass quantize='int4'"
FROM_PRETRAINED: Table = {
    "config": ((), "edit config.json in a copy of the directory"),
    "generation_config": ((), "set options of model.generation_config, or pass them to generate()"),
    "state_dict": ((), "save it with safetensors, beside config.json"),
    "ignore_mismatched_sizes": ((False,), "weights of other shapes are refused"),
    "key_mapping": ((), "rename the tensors in the file"),
    "weights_only": ((True,), "pickles are not read"),
    "disable_mmap": (ANY, ""),
    "adapter_name": ((), _ADAPTER),
    "adapter_kwargs": ((), _ADAPTER),
    "use_kernels": (ANY, ""),
    "kernel_config": ((), "the kernels are this project's: omit it"),
    "allow_all_kernels": ((False,), "the kernels are this project's: omit it"),
    "experts_implementation": (ANY, ""),
    "fusion_config": ((), "projections are always fused: omit it"),
    "offload_folder": ((), _ONE_DEVICE),
    "offload_buffers": ((False,), _ONE_DEVICE),
    "offload_state_dict": (ANY, ""),
    "max_memory": ((), _ONE_DEVICE),
    "tp_plan": ((), _ONE_DEVICE),
    "tp_size": ((1,), _ONE_DEVICE),
    "device_mesh": ((), _ONE_DEVICE),
    "distributed_config": ((), _ONE_DEVICE),
    "variant": ((), "rename the files of the variant to model.safetensors"),
    "proxies": ((), _DOWNLOAD),
    "tqdm_class": ((), _DOWNLOAD),
    "attn_implementation": (
        (
            "eager",
            "sdpa",
            "flash_attention_2",
            "flash_attention_3",
            "flash_attention_4",
            "flex_attention",
        ),
        "attention runs on this project's kernels; omit it",
    ),
    "low_cpu_mem_usage": (ANY, ""),
    "use_safetensors": ((True,), "pickles are not read: convert them to safetensors"),
    "trust_remote_code": (ANY, ""),  # no code of a checkpoint is run, and Gemma needs none
    "quantization_config": ((), "pass quantize='int8' or 'int4'; quantized files need no option"),
    "load_in_8bit": ((False,), "pass quantize='int8'"),
    "load_in_4bit": ((False,), "pass quantize='int4'"),
    "output_loading_info": ((False,), "missing and unexpected tensors raise ValueError"),
    "use_auth_token": ((), "pass token"),
    **dict.fromkeys(DOWNLOAD, (ANY, "")),
    "subfolder": (("",), _DOWNLOAD),
    "gguf_file": ((), "pass the path of the .gguf file itself"),
}
_MERGE = "merge it: peft's merge_and_unload(), then save_pretrained(); or use lm_eval's model hf"
# Arguments of lm_eval's model `hf`, without those of `gemma-fast` and of from_pretrained.
LM_EVAL: Table = {
    "backend": (("default", "causal"), "Gemma is a causal model: omit it"),
    "trust_remote_code": (ANY, ""),  # Gemma needs no code of a checkpoint, and none is run
    "use_fast_tokenizer": (ANY, ""),
    "logits_cache": (ANY, ""),  # continuations of equal contexts always share logits
    "softmax_dtype": (("float32",), "omit it: probabilities are computed in float32"),
    "mixed_precision_dtype": ((), "pass dtype"),
    "parallelize": ((False,), _ONE_DEVICE),
    "max_memory_per_gpu": (ANY, ""),
    "max_cpu_memory": (ANY, ""),
    "offload_folder": (ANY, ""),
    "tp_plan": ((), _ONE_DEVICE),
    "peft": ((), _MERGE),
    "delta": ((), "add the weights, and save the sum; or use lm_eval's model hf"),
    "autogptq": ((False,), _GPTQ),
    "gptqmodel": ((False,), _GPTQ),
}


def download_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keywords of DOWNLOAD in a call of from_pretrained."""
    return {name: given[name] for name in DOWNLOAD if given.get(name) is not None}


def check_keywords(call: str, given: Mapping[str, Any], table: Table) -> None:
    """Raises TypeError for a keyword that is not in the table, or whose value is not in the table.
    None, [] and {} are accepted for every keyword of the table."""
    for name, value in given.items():
        if name not in table:
            near = get_close_matches(name, [*table, *PARAMETERS], n=1, cutoff=0.75)
            hint = f": did you mean {near[0]}?" if near and near[0] != name else ""
            raise TypeError(f"{call} got an unexpected keyword argument {name!r:.60}{hint}")
        same, way_out = table[name]
        if isinstance(value, list | tuple | dict) and not value:
            continue
        if value is not None and not (value in same if isinstance(value, _PLAIN) else same is ANY):
            plain = isinstance(value, (*_PLAIN, list, tuple, dict))
            shown = f"{value!r:.60}" if plain else f"<{type(value).__name__}>"
            raise TypeError(f"{call}: {name}={shown} is not supported: {way_out}")


_PLAIN = (bool, int, float, str)
