"""Converts config.json (of transformers 4 or 5) to a GemmaConfig.

The tables say what happens to each field: APPLIED, REFUSED or IGNORED. A field is applied for the
families for which transformers reads it. A field in none of the tables gives a warning.

The input is untrusted. Raises ValueError, with the field's name, if a field is missing, has a wrong
type, is out of range, or requires a computation that this project does not support.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from gemma_fast.checkpoint.gemma4_layers import EXPERTS, expert_fields, layer_fields
from gemma_fast.checkpoint.rope_fields import USE_HF, rope_of
from gemma_fast.config import FAMILIES, SHAPES, GemmaConfig

# model_type in config.json → family. transformers has two classes for Gemma 4's text model, which
# differ in their fields and defaults only: here they are the families gemma4 and gemma4_unified.
MULTIMODAL = ("gemma3", "gemma4", "gemma4_unified")
MODEL_TYPES = {"gemma": "gemma", "gemma2": "gemma2"}
MODEL_TYPES |= {kind: family for family in MULTIMODAL for kind in (family, f"{family}_text")}
GEMMA_4 = ("gemma4", "gemma4_unified")
BEFORE_4 = ("gemma", "gemma2", "gemma3")
ALL, WINDOWED = (*BEFORE_4, *GEMMA_4), ("gemma2", "gemma3", *GEMMA_4)
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Field → the families for which transformers reads it. For other families it has no effect.
APPLIED = {
    **dict.fromkeys((*SHAPES, *TOKENS, "model_type", "rms_norm_eps"), ALL),
    **dict.fromkeys(("max_position_embeddings", "tie_word_embeddings", "dtype"), ALL),
    **dict.fromkeys(("rope_parameters", "rope_scaling", "rope_theta"), ALL),
    **dict.fromkeys(("sliding_window", "layer_types", "final_logit_softcapping"), WINDOWED),
    **dict.fromkeys(("global_head_dim", "num_global_key_value_heads", "per_layer_config"), GEMMA_4),
    **dict.fromkeys(("attention_k_eq_v", "num_kv_shared_layers", "use_double_wide_mlp"), GEMMA_4),
    **dict.fromkeys(("hidden_size_per_layer_input", "vocab_size_per_layer_input"), ("gemma4",)),
    **dict.fromkeys(("enable_moe_block", *EXPERTS), ("gemma4",)),
    "query_pre_attn_scalar": ("gemma2", "gemma3"),
    "torch_dtype": ALL,  # older name of dtype
    "text_config": MULTIMODAL,
    "attn_logit_softcapping": ("gemma2",),
    "sliding_window_pattern": ("gemma3",),
    "rope_local_base_freq": ("gemma3",),
    "original_max_position_embeddings": ("gemma", "gemma2"),
}


class Refused(NamedTuple):
    """A field of which only some values are supported."""

    field: str
    families: tuple[str, ...]  # those for which transformers reads it
    supported: tuple[Any, ...]
    way_out: str  # what to do about another value


REFUSED = (
    # Gemma 1's configs contain "gelu", but the model uses GELU's tanh approximation.
    Refused("hidden_act", ("gemma",), ("gelu", "gelu_pytorch_tanh"), USE_HF),
    Refused("hidden_activation", WINDOWED, ("gelu_pytorch_tanh",), USE_HF),
    Refused("attention_bias", ALL, (False,), USE_HF),
    Refused("use_bidirectional_attention", BEFORE_4, (False, None), USE_HF),
    # "vision": tokens of one image see each other. Attention between tokens of text is causal.
    Refused("use_bidirectional_attention", GEMMA_4, (False, None, "vision"), "use transformers"),
    Refused("partial_rotary_factor", ALL, (1,), USE_HF),
    Refused("is_encoder_decoder", ALL, (False,), "use transformers"),
    Refused("per_layer_config", BEFORE_4, (None,), "use transformers"),
    Refused(
        "quantization_config", ALL, (None,),
        "use a .gguf file, an unquantized checkpoint, or transformers",
    ),
)  # fmt: skip
# Fields without an effect on logits: transformers ignores them when it runs a Gemma model.
IGNORED = {
    "architectures", "attention_dropout", "cache_implementation",
    "chunk_size_feed_forward", "id2label", "initializer_range", "label2id", "num_labels",
    "output_attentions", "output_hidden_states", "problem_type", "return_dict",
    "transformers_version", "use_cache",
    # Parts of a multimodal model that are not read.
    "audio_config", "audio_token_id", "boa_token_id", "boi_token_id", "boi_token_index",
    "eoa_token_id", "eoa_token_index", "eoi_token_id", "eoi_token_index", "image_token_id",
    "image_token_index", "mm_tokens_per_image", "video_token_id", "vision_config",
    "vision_soft_tokens_per_image",
    # Written by old releases of transformers, and by libraries for training.
    "_attn_implementation_autoset", "_name_or_path", "_sliding_window_pattern",
    "attn_implementation", "model_max_length", "unsloth_fixed", "unsloth_version",
    "use_return_dict",
    # Options of generate(): transformers 5 reads them in generation_config.json only.
    "bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty",
    "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "max_new_tokens", "min_length", "min_new_tokens",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_scores", "prefix", "remove_invalid_values", "repetition_penalty",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "temperature", "top_k", "top_p",
    "typical_p",
    # Settings of other kinds of models that old releases wrote for every model.
    "add_cross_attention", "cross_attention_hidden_size", "finetuning_task", "is_decoder",
    "pruned_heads", "task_specific_params", "tf_legacy_loss", "tie_encoder_decoder",
    "tokenizer_class", "torchscript", "use_bfloat16",
}  # fmt: skip
# transformers' defaults for shapes that are missing in a config.json, in the order of SHAPES.
DEFAULT_SHAPES = {
    "gemma": (256_000, 3072, 28, 16, 16, 256, 24576),
    "gemma2": (256_000, 2304, 26, 8, 4, 256, 9216),
    "gemma3": (262_208, 2304, 26, 8, 4, 256, 9216),
    **dict.fromkeys(GEMMA_4, (262_144, 2304, 30, 8, 4, 256, 9216)),
}
# transformers' defaults for other fields.
DEFAULTS = FAMILIES | {
    "gemma4": FAMILIES["gemma4"]
    | {"hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262_144},
    "gemma4_unified": FAMILIES["gemma4"]
    | {"max_position_embeddings": 262_144, "sliding_window": 1024},
}
NULLABLE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")


def config_from_json(config: Mapping[str, Any], source: str = "config.json") -> GemmaConfig:
    """Converts the content of a config.json. Warnings name `source`.

    In a multimodal model, the text model's fields are under `text_config`, and fields with default
    values are missing. Raises ValueError for models other than Gemma, and for variants that
    are not supported.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"the config must be a JSON object, not a {type(config).__name__}")
    family = MODEL_TYPES.get(str(config.get("model_type")))
    if family is None:
        raise ValueError(
            f"model_type {config.get('model_type')!r:.80} is not one of"
            f" {', '.join(MODEL_TYPES)}: use transformers for other models"
        )
    given = _text_fields(config)
    for name, value in given.items():
        _check_field(name, value, family, source)
    read = {name: value for name, value in given.items() if family in APPLIED.get(name, ())}
    values = dict(zip(SHAPES, DEFAULT_SHAPES[family], strict=True)) | DEFAULTS[family]
    for name in {f.name for f in fields(GemmaConfig)} - {*EXPERTS} | {"sliding_window_pattern"}:
        if (value := read.get(name)) is not None or (name in read and name in NULLABLE):
            values[name] = tuple(value) if isinstance(value, list) else value
    values |= _special_tokens(read, values["vocab_size"], source)
    if family == "gemma":
        values["query_pre_attn_scalar"] = values["head_dim"]
    values.setdefault("query_pre_attn_scalar", 256)
    values["model_type"] = family.removesuffix("_unified")
    if family in GEMMA_4:
        values |= layer_fields(read, values, source) | expert_fields(read)
    kinds, context = values.get("layer_types", ()), values["max_position_embeddings"]
    return GemmaConfig(**values | rope_of(read, values["model_type"], context, kinds))


def dtype_name(config: Mapping[str, Any]) -> str | None:
    """Returns the name of the dtype in which transformers computes this checkpoint, or None if the
    config does not set it."""
    name = config.get("dtype") or config.get("torch_dtype")
    return None if name is None else str(name).removeprefix("torch.")


def _text_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of the text model. In a multimodal config they are under `text_config`,
    but token ids and `tie_word_embeddings` outside of it come first, as in transformers."""
    kind = config["model_type"]
    if kind not in MULTIMODAL:
        return dict(config)
    given = config.get("text_config")
    if not isinstance(given, Mapping):
        raise ValueError(
            f"text_config={given!r:.60} must be a JSON object: model_type {kind} is multimodal; a"
            f" text model has model_type {kind}_text"
        )
    if given.get("model_type", f"{kind}_text") != f"{kind}_text":
        raise ValueError(f"text_config: model_type {given['model_type']!r:.80} is not {kind}_text")
    if kind == "gemma3" and given.get("final_logit_softcapping") is not None:
        raise ValueError(
            "text_config.final_logit_softcapping is not supported: transformers ignores it in the"
            " multimodal model, and applies it in the text model; remove it, or save the text model"
        )
    outside = {name: config[name] for name in config if config[name] is not None}
    return dict(given) | {k: v for k, v in outside.items() if k not in given or k in _OUTSIDE}


_OUTSIDE = (*TOKENS, "tie_word_embeddings", "model_type")


def _check_field(name: str, value: Any, family: str, source: str) -> None:
    """Raises ValueError for a value that is not supported. Warns if the field is unknown."""
    rules = [rule for rule in REFUSED if rule.field == name]
    for _, families, supported, way_out in rules:
        if family in families and value is not None and value not in supported:
            raise ValueError(
                f"{name}={value!r:.80} is not supported, only"
                f" {' or '.join(str(x) for x in supported)}: {way_out}"
            )
    if not rules and name not in {*APPLIED, *IGNORED}:
        warnings.warn(
            f"{source}: the field {name:.60}={value!r:.60} is unknown and has no effect",
            stacklevel=2,
        )


def _special_tokens(read: Mapping[str, Any], vocab_size: Any, source: str) -> dict[str, Any]:
    """Returns the token ids of the config. Warns of an id outside the vocabulary, and ignores it.

    Without an end token, no token ends a text. Without a padding token, `generate` pads with the
    first end token.
    """
    found: dict[str, Any] = {}
    for name in TOKENS:
        given = read.get(name)
        ids: list[Any] = given if isinstance(given, list) else [given] * (given is not None)
        whole = all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
        single = name == "eos_token_id" or not isinstance(given, list)
        if name not in read or not (whole and single and isinstance(vocab_size, int)):
            continue  # the default, or a value that GemmaConfig refuses
        kept = tuple(i for i in ids if 0 <= i < vocab_size)
        if len(kept) < len(ids):
            problem = f"{source}: {name}={given!r:.60} is not in the vocabulary: it is ignored"
            warnings.warn(problem, stacklevel=2)
        if name == "eos_token_id":
            found[name] = kept if isinstance(given, list) or not kept else kept[0]
        elif kept:
            found[name] = kept[0]
        elif name == "pad_token_id":
            ends = found.get("eos_token_id", 1)
            found[name] = ends if isinstance(ends, int) else (*ends, 0)[0]
        else:
            found[name] = 2  # GemmaConfig's default; it has no effect here
    return found
