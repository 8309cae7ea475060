"""Allowed values of the fields of GemmaConfig and RopeParameters. They limit what a damaged config
can allocate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

INT_RANGES = {
    "vocab_size": (1, 1 << 20),
    "hidden_size": (1, 1 << 16),
    "num_hidden_layers": (1, 512),
    "num_attention_heads": (1, 512),
    "num_key_value_heads": (1, 512),
    "head_dim": (2, 1024),
    "global_head_dim": (2, 1024),
    "num_global_key_value_heads": (1, 512),
    "num_kv_shared_layers": (0, 511),
    "hidden_size_per_layer_input": (0, 1 << 13),
    "vocab_size_per_layer_input": (1, 1 << 20),
    "intermediate_size": (1, 1 << 18),
    "num_experts": (0, 1024),
    "top_k_experts": (0, 64),
    "moe_intermediate_size": (0, 1 << 16),
    "max_position_embeddings": (1, 1 << 24),
    "sliding_window": (1, 1 << 24),
    "sliding_window_pattern": (1, 512),
    "bos_token_id": (0, 1 << 20),
    "pad_token_id": (0, 1 << 20),
    "eos_token_id": (0, 1 << 20),
}
FLOAT_RANGES = {
    "query_pre_attn_scalar": (1e-3, 1e6),
    "rms_norm_eps": (1e-12, 1e-1),
    "attn_logit_softcapping": (1e-3, 1e6),
    "final_logit_softcapping": (1e-3, 1e6),
}
OPTIONAL = {
    "attn_logit_softcapping", "final_logit_softcapping", "sliding_window",
    "sliding_window_pattern", "global_head_dim", "num_global_key_value_heads",
    "vocab_size_per_layer_input",
}  # fmt: skip
BOOLS = ("tie_word_embeddings", "attention_k_eq_v", "use_double_wide_mlp")
ROPE_TYPES = ("default", "linear", "proportional", "yarn")
ROPE_RANGES = {
    "rope_theta": (1.0, 1e12),
    "factor": (1e-3, 1e4),
    "partial_rotary_factor": (0, 1),
    "original_max_position_embeddings": (1, 1 << 24),
    "attention_factor": (1e-3, 1e3),
    "beta_fast": (1e-3, 1e6),
    "beta_slow": (1e-3, 1e6),
}


def check_ranges(values: Mapping[str, Any]) -> None:
    """Raises ValueError unless all values of GemmaConfig's fields are in their ranges, and shapes
    fit together."""
    for name, (low, high) in (INT_RANGES | FLOAT_RANGES).items():
        given = values[name]
        if given is None and name in OPTIONAL:
            continue
        several = name == "eos_token_id" and isinstance(given, tuple)
        for value in given if several else [given]:
            check_number(name, value, low, high, whole=name in INT_RANGES)
    for name in BOOLS:
        if not isinstance(values[name], bool):
            raise ValueError(f"{name}={values[name]!r:.80} must be a bool")
    _check_shapes(values)


def _check_shapes(values: Mapping[str, Any]) -> None:
    heads, vocab = values["num_attention_heads"], values["vocab_size"]
    for name in ("num_key_value_heads", "num_global_key_value_heads"):
        if heads % (values[name] or 1):
            raise ValueError(
                f"num_attention_heads={heads!r} is not divisible by {name}={values[name]!r}"
            )
    for name in ("head_dim", "global_head_dim"):
        if (values[name] or 0) % 2:
            raise ValueError(f"{name}={values[name]!r} is odd: rotary embedding needs pairs")
    if (rows := values["vocab_size_per_layer_input"]) is not None and rows < vocab:
        raise ValueError(f"vocab_size_per_layer_input={rows!r} is below vocab_size={vocab!r}")
    experts, top, width = (
        values[name] for name in ("num_experts", "top_k_experts", "moe_intermediate_size")
    )
    if experts and (values["model_type"] != "gemma4" or not 0 < top <= experts or not width):
        raise ValueError(
            f"num_experts={experts!r} with top_k_experts={top!r} and"
            f" moe_intermediate_size={width!r}: a mixture of experts needs model_type gemma4, a"
            " width, and from 1 to num_experts experts for each token"
        )


def check_number(name: str, value: Any, low: float, high: float, whole: bool = False) -> None:
    """Raises ValueError unless value is a number from low to high, and an integer if `whole`."""
    kinds, kind = ((int,), "an integer") if whole else ((int, float), "a number")
    number = isinstance(value, kinds) and not isinstance(value, bool)
    if not (number and low <= value <= high):
        raise ValueError(f"{name}={value!r:.80} must be {kind} from {low:g} to {high:g}")
