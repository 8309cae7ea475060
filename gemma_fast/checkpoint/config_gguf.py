"""Converts GGUF metadata to a GemmaConfig and to options of `generate`, as llama.cpp reads them.

GGUF does not store query_pre_attn_scalar, and most files do not store the layer pattern and the
theta of windowed layers. The architecture and the number of layers determine these fields. Keys of
Gemma 4's layers are in gemma4_gguf.py, keys of the tokenizer in text/gguf_settings.py.

The metadata are untrusted. Raises ValueError, with the key, for a value that is missing, out of
range, or requires a computation that this project does not support. Warns of a key of the
architecture that is in no table.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from gemma_fast.checkpoint import gemma4_gguf
from gemma_fast.config import FAMILIES, FULL, SLIDING, GemmaConfig, RopeParameters
from gemma_fast.ranges import INT_RANGES, check_number

# Field of GemmaConfig → key after the architecture's name.
APPLIED = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "num_key_value_heads": "attention.head_count_kv",  # default: the number of query heads
    "head_dim": "attention.key_length",  # default: hidden size / query heads
}
OPTIONAL = ("num_key_value_heads", "head_dim")
# Keys whose use depends on the family.
LAYER_KEYS = (
    "attention.sliding_window", "attention.sliding_window_pattern", "attn_logit_softcapping",
    "final_logit_softcapping",
)  # fmt: skip
ROPE_KEYS = (
    "rope.freq_base", "rope.freq_base_swa", "rope.scaling.type", "rope.scaling.factor",
    "rope.scale_linear",
)  # fmt: skip
# Key → the only supported value. llama.cpp computes something else for other values.
REFUSED: dict[str, Any] = {
    "attention.causal": True, "expert_count": 0, "nextn_predict_layers": 0,
    "rope.scaling.attn_factor": 1,
}  # fmt: skip
# Keys that must equal the head dim.
HEAD_DIMS = (
    "attention.value_length", "attention.key_length_swa", "attention.value_length_swa",
    "rope.dimension_count", "rope.dimension_count_swa",
)  # fmt: skip
# Keys that llama.cpp reads for every architecture, and that have no effect on Gemma's logits.
IGNORED = (
    "vocab_size", "embedding_length_out", "pooling_type", "expert_used_count",
    "expert_group_count", "expert_group_used_count", "tensor_data_layout", "rope.scaling.alpha",
    "rope.scaling.original_context_length", "rope.scaling.finetuned",
)  # fmt: skip
# Models whose scale of queries is not head_dim ** -0.5, by family and number of layers: the 27B.
SCALED_BY_HIDDEN = (("gemma2", 46), ("gemma3", 62))
# Tokens that end a text, by the name of their key and by their text. llama.cpp's list of texts also
# has </s>, which is an HTML tag in Gemma's vocabulary.
END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
END_NAMES = {
    "<eos>", "<end_of_turn>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<|endoftext|>", "<|eom_id|>",
    "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<turn|>",
    "<|tool_response>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "[e~[",
}  # fmt: skip
# Option of `generate` → key after "general.sampling."
SAMPLING = {
    "temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}  # fmt: skip
TOKEN_ID = 0, 1 << 20


def config_from_gguf(metadata: Mapping[str, Any]) -> GemmaConfig:
    """Converts a GGUF file's metadata to a config, with tied embeddings. That of a Gemma 4 still
    needs `gemma4_gguf.with_tensors`."""
    family = metadata.get("general.architecture")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"general.architecture {family!r:.60} is not one of {', '.join(FAMILIES)}")
    if (kind := metadata.get("general.type", "model")) != "model":
        raise ValueError(f"general.type {kind!r} is not supported, only 'model'")
    dot = f"{family}."
    given = {
        key.removeprefix(dot): _rounded(value)
        for key, value in metadata.items()
        if key.startswith(dot) and value is not None
    }
    by_layer = gemma4_gguf.layer_fields(given) if family == "gemma4" else {}
    _check_keys(given, family)
    values = {name: given[key] for name, key in APPLIED.items() if key in given} | by_layer
    for name, key in APPLIED.items():
        if name not in values and name not in OPTIONAL:
            raise ValueError(f"the GGUF metadata has no {dot}{key}: convert the model again")
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
        check_number(dot + APPLIED[name], values[name], *INT_RANGES[name], whole=True)
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    layers = values["num_hidden_layers"]
    values = {"num_key_value_heads": heads, "head_dim": hidden // heads} | values
    for key in HEAD_DIMS:
        if given.get(key, values["head_dim"]) != values["head_dim"]:
            raise ValueError(
                f"{dot}{key}={given[key]!r} must equal {dot}{APPLIED['head_dim']}"
                f"={values['head_dim']!r}: use llama.cpp"
            )
    scaled = (family, layers) in SCALED_BY_HIDDEN
    values.setdefault("query_pre_attn_scalar", hidden // heads if scaled else values["head_dim"])
    if not isinstance(tokens := metadata.get("tokenizer.ggml.tokens"), list):
        raise ValueError(
            "the GGUF metadata has no list tokenizer.ggml.tokens: convert the model again"
        )
    ids: dict[str, Any] = {f"{x}_token_id": _token_id(metadata, x) for x in ("bos", "eos")}
    ids["pad_token_id"] = _token_id(metadata, "padding")
    return GemmaConfig(
        model_type=family,
        vocab_size=len(tokens),
        **_windows(given, family, layers) | _rope(given, family) | values,
        **{name: token for name, token in ids.items() if token is not None},
    )


def generation_from_gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of `generate` that a GGUF file sets: end tokens, suppressed tokens and
    `general.sampling.*`. Warns of sampling settings that `generate` does not have."""
    ends = _end_tokens(metadata)
    found: dict[str, Any] = {"eos_token_id": ends} if ends else {}
    if suppressed := metadata.get("tokenizer.ggml.suppress_tokens"):
        for token in suppressed if isinstance(suppressed, list) else [suppressed]:
            check_number("tokenizer.ggml.suppress_tokens", token, *TOKEN_ID, whole=True)
        found["suppress_tokens"] = suppressed
    return found | _sampling(metadata)


def _end_tokens(metadata: Mapping[str, Any]) -> list[int]:
    """Returns the tokens that end a text."""
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    ends = {i for i, token in enumerate(tokens) if token in END_NAMES}
    found = (_token_id(metadata, name) for name in END_KEYS)
    return sorted(ends | {token for token in found if token is not None})


def _sampling(metadata: Mapping[str, Any]) -> dict[str, Any]:
    dot = "general.sampling."
    given = {k.removeprefix(dot): _rounded(v) for k, v in metadata.items() if k.startswith(dot)}
    options = {name: given.pop(key) for name, key in SAMPLING.items() if key in given}
    for name, value in options.items():
        check_number(dot + SAMPLING[name], value, -math.inf, math.inf)
    if options:
        options["do_sample"] = options.get("temperature", 1) > 0
    if options.get("top_k", 0) < 0:
        options["top_k"] = 0  # llama.cpp: a negative number keeps all tokens
    if options.get("repetition_penalty", 1) == 1 or given.get("penalty_last_n") == -1:
        given.pop("penalty_last_n", None)  # otherwise llama.cpp penalizes only the last tokens
    for name, value in given.items():
        if value and name not in ("xtc_threshold", "mirostat_tau", "mirostat_eta"):
            problem = f"{dot}{name}={value!r:.60} has no effect: generate() has no such option"
            warnings.warn(problem, stacklevel=2)
    return options


def _check_keys(given: dict[str, Any], family: str) -> None:
    """Raises ValueError for a value that is not supported. Warns of an unknown key. Replaces a list
    with one value per layer by this value, unless the layers differ."""
    known = {*APPLIED.values(), *LAYER_KEYS, *ROPE_KEYS, *HEAD_DIMS, *IGNORED}
    for key, value in given.items():
        if key in REFUSED and value != REFUSED[key]:
            raise ValueError(
                f"{family}.{key}={value!r:.60} is not supported, only {REFUSED[key]!r}: use"
                " llama.cpp"
            )
        if key not in REFUSED and key not in known:
            problem = f"the GGUF key {family}.{key}={value!r:.60} is unknown and has no effect"
            warnings.warn(problem, stacklevel=2)
        if isinstance(value, list) and key in APPLIED.values():
            if len(set(map(str, value))) != 1:
                raise ValueError(
                    f"{family}.{key}={value!r:.60}: layers of different shapes are not supported"
                )
            given[key] = value[0]


def _windows(given: Mapping[str, Any], family: str, layers: int) -> dict[str, Any]:
    """Returns window, layer types and soft caps. Absent keys have llama.cpp's defaults."""
    if family == "gemma":
        return {}
    caps = {"final_logit_softcapping": given.get("final_logit_softcapping") or None}
    if family == "gemma2":
        names = "attn_logit_softcapping", "final_logit_softcapping"
        caps = {name: given.get(name, FAMILIES["gemma2"][name]) for name in names}
    if family == "gemma4":
        caps = {"final_logit_softcapping": given.get("final_logit_softcapping", 30.0) or None}
        return caps | {"sliding_window": given.get("attention.sliding_window")}
    window = given.get("attention.sliding_window", 4096 if family == "gemma2" else 0)
    if window == 0 and family == "gemma3":
        return caps | {"sliding_window": None, "layer_types": (FULL,) * layers}
    pattern = given.get("attention.sliding_window_pattern", 2 if family == "gemma2" else 6)
    if not isinstance(pattern, list):
        check_number("attention.sliding_window_pattern", pattern, 0, 512, whole=True)
        pattern = [not pattern or i % pattern < pattern - 1 for i in range(layers)]
    kinds = tuple(SLIDING if windowed else FULL for windowed in pattern)
    return caps | {"sliding_window": window, "layer_types": kinds}


def _rope(given: Mapping[str, Any], family: str) -> dict[str, RopeParameters]:
    kind = given.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise ValueError(
            f"{family}.rope.scaling.type {kind!r} is not supported, only 'none' and 'linear': use"
            " llama.cpp"
        )
    theta = given.get("rope.freq_base", 1e4)
    factor = given.get("rope.scaling.factor", given.get("rope.scale_linear", 0)) or 1
    full = _linear(theta, 1 if kind == "none" else factor)
    if family == "gemma":
        return {"full_rope": full, "sliding_rope": full}
    local = (theta, factor) if family == "gemma2" else (1e4, 1)
    sliding = _linear(given.get("rope.freq_base_swa", local[0]), local[1])
    return {"full_rope": full, "sliding_rope": sliding}


def _linear(theta: float, factor: float) -> RopeParameters:
    if factor == 1:
        return RopeParameters(theta)
    return RopeParameters(theta, "linear", factor)


def _token_id(metadata: Mapping[str, Any], name: str) -> int | None:
    """Returns a special token. Warns of an id outside the vocabulary, and ignores it, as llama.cpp
    does."""
    key, tokens = f"tokenizer.ggml.{name}_token_id", metadata.get("tokenizer.ggml.tokens")
    if (token := metadata.get(key)) is None:
        return None
    if not isinstance(token, int) or isinstance(token, bool):
        raise ValueError(f"{key}={token!r:.60} must be a token id")
    if not 0 <= token < (len(tokens) if isinstance(tokens, list) else TOKEN_ID[1]):
        warnings.warn(f"{key}={token} is not in the vocabulary: it is ignored", stacklevel=2)
        return None
    return token


def _rounded(value: Any) -> Any:
    """GGUF has float32, in which 1e-6 is 9.99999997e-07. Returns the shorter decimal number."""
    return float(f"{value:.7g}") if isinstance(value, float) else value
