"""Converts config.json (of transformers 4 or 5) or GGUF metadata to a GemmaConfig.

Both inputs are untrusted. Raises ValueError, with the field's name, if a field is missing, has a
wrong type, is out of range, or requires a computation that this project does not support.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from gemma_fast.config import FAMILIES, FULL, SHAPES, SLIDING, GemmaConfig

# transformers' defaults for shapes that are missing in a config.json, in the order of SHAPES.
DEFAULT_SHAPES = {
    "gemma": (256_000, 3072, 28, 16, 16, 256, 24576),
    "gemma2": (256_000, 2304, 26, 8, 4, 256, 9216),
    "gemma3": (262_208, 2304, 26, 8, 4, 256, 9216),
}
GGUF_KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "sliding_window": "attention.sliding_window",
    "rope_theta": "rope.freq_base",
    "rope_scaling_factor": "rope.scaling.factor",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# Fields that a multimodal config.json may have outside its text_config.
TOP_LEVEL = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
# The only supported value of each of these fields.
VARIANTS = {
    "attention_bias": False,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": False,
}


def config_from_json(config: Mapping[str, Any]) -> GemmaConfig:
    """Converts the content of a config.json. In a multimodal Gemma 3, the text model's fields are
    under `text_config`, and fields with default values are missing. Raises ValueError for models
    other than Gemma, and for variants that are not supported."""
    if not isinstance(config, Mapping):
        raise ValueError(f"the config must be a JSON object, not a {type(config).__name__}")
    family = str(config.get("model_type")).removesuffix("_text")
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not one of {', '.join(FAMILIES)}")
    given = config.get("text_config", config)
    if not isinstance(given, Mapping):
        raise ValueError(f"text_config must be a JSON object, not a {type(given).__name__}")
    given = {k: config[k] for k in TOP_LEVEL if k in config} | dict(given)
    _refuse_variants(given)
    values = dict(zip(SHAPES, DEFAULT_SHAPES[family], strict=True)) | FAMILIES[family]
    for name in {f.name for f in fields(GemmaConfig)} | {"sliding_window_pattern"}:
        value = given.get(name, given.get(f"_{name}"))  # some transformers versions save _name
        if value is not None or (name in given and name.endswith("softcapping")):
            values[name] = tuple(value) if isinstance(value, list) else value
    if family == "gemma":
        values["query_pre_attn_scalar"] = values["head_dim"]
    values.setdefault("query_pre_attn_scalar", 256)
    return GemmaConfig(**values | {"model_type": family} | _rope(given, family, values))


def config_from_gguf(metadata: Mapping[str, Any]) -> GemmaConfig:
    """Converts a GGUF file's metadata. GGUF does not store the layer pattern, the local theta and
    query_pre_attn_scalar, so the architecture determines these fields, as in llama.cpp."""
    family = metadata.get("general.architecture")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"general.architecture {family!r} is not one of {', '.join(FAMILIES)}")
    tokens = metadata.get("tokenizer.ggml.tokens")
    values = FAMILIES[family] | {"vocab_size": len(tokens) if isinstance(tokens, list) else None}
    keys = {name: f"{family}.{key}" for name, key in GGUF_KEYS.items()}
    for name, key in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
        keys[f"{name}_token_id"] = f"tokenizer.ggml.{key}_token_id"
    for name, key in keys.items():
        value = metadata.get(key)
        if isinstance(value, float):
            value = float(f"{value:.7g}")  # GGUF has float32: 1e-6 is stored as 9.99999997e-07
        if value is not None:
            values[name] = value
        elif name in SHAPES:
            raise ValueError(f"the GGUF metadata has no {key}: convert the model again")
    scaling = metadata.get(f"{family}.rope.scaling.type", "none")
    if scaling not in ("none", "linear") or (scaling == "linear" and family != "gemma3"):
        raise ValueError(
            f"{family}.rope.scaling.type {scaling!r} is not supported, only 'none' and, for gemma3,"
            " 'linear'"
        )
    if scaling == "none":
        values["rope_scaling_factor"] = 1.0
    if family == "gemma2" and "rope_theta" in values:
        values["rope_local_base_freq"] = values["rope_theta"]
    values["query_pre_attn_scalar"] = values["head_dim"]
    config = GemmaConfig(model_type=family, **values)
    if (family, config.num_hidden_layers) in (("gemma2", 46), ("gemma3", 62)):  # the 27B models
        heads = config.num_attention_heads
        return replace(config, query_pre_attn_scalar=config.hidden_size / heads)
    return config


def _refuse_variants(given: Mapping[str, Any]) -> None:
    """Raises ValueError for a variant of Gemma that this project does not support."""
    activation = given.get("hidden_activation") or given.get("hidden_act") or "gelu"
    # Gemma 1's configs contain "gelu", but the model uses GELU's tanh approximation.
    if activation not in ("gelu", "gelu_pytorch_tanh"):
        raise ValueError(
            f"hidden_activation {activation!r} is not supported, only gelu_pytorch_tanh"
        )
    for name, expected in VARIANTS.items():
        if (value := given.get(name)) not in (None, expected):
            raise ValueError(f"{name}={value!r} is not supported, only {expected}")


def _rope(given: Mapping[str, Any], family: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the RoPE fields of GemmaConfig: both thetas and the scaling factor. Reads
    `rope_parameters` (transformers 5), or rope_theta, rope_local_base_freq and rope_scaling
    (transformers 4)."""
    new = given.get("rope_parameters") or {}
    per_layer = isinstance(new, Mapping) and (FULL in new or SLIDING in new)
    full = (new.get(FULL) if per_layer else new) or {}
    local = (new.get(SLIDING) if per_layer else {}) or {}
    scaling = given.get("rope_scaling") or full
    for rope in (full, local, scaling):
        if not isinstance(rope, Mapping):
            raise ValueError(f"rope_parameters and rope_scaling must be JSON objects, not {rope!r}")
    kind = scaling.get("rope_type", scaling.get("type")) or "default"
    if kind not in ("default", "linear") or (kind == "linear" and family == "gemma2"):
        raise ValueError(
            f"rope_type {kind!r} is not supported for {family}, only 'default' and, for gemma and"
            " gemma3, 'linear'"
        )
    if local.get("rope_type", "default") != "default":
        raise ValueError(
            f"rope_type {local['rope_type']!r} on {SLIDING} layers is not supported, only 'default'"
        )
    theta = full.get("rope_theta", values.get("rope_theta", 1e4))
    local_theta = values.get("rope_local_base_freq", 1e4 if family == "gemma3" else theta)
    return {
        "rope_theta": theta,
        "rope_local_base_freq": local.get("rope_theta", local_theta),
        "rope_scaling_factor": scaling.get("factor", 1.0) if kind == "linear" else 1.0,
    }
