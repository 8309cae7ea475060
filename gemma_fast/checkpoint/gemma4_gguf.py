"""Reads what differs between the layers of a Gemma 4 in a GGUF file, as llama.cpp reads it.

Two facts are in the tensors instead of the metadata. Full layers without a tensor `attn_v` use
their keys as values. `rope_freqs.weight` has a divisor for each rotary frequency of full layers:
ones, then 1e30 for the pairs that do not rotate.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gemma_fast.config import FULL, SLIDING, GemmaConfig
from gemma_fast.ranges import INT_RANGES, check_number

ROPE_FACTORS = "rope_freqs.weight"
STILL = 1e30  # divisor of a pair that does not rotate
# Field of GemmaConfig → key of the mixture of experts.
EXPERTS = {
    "num_experts": "expert_count", "top_k_experts": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}  # fmt: skip
# Key of a head dim → keys that must have the same value.
HEAD_DIMS = {
    "attention.key_length": ("attention.value_length", "rope.dimension_count"),
    "attention.key_length_swa": ("attention.value_length_swa", "rope.dimension_count_swa"),
}


def layer_fields(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of GemmaConfig that say what differs between layers, and removes their
    keys from `given` (key without "gemma4." → value).

    Raises ValueError, with the key, for shapes that are not supported.
    """
    layers: Any = given.get("block_count")
    shared = given.pop("attention.shared_kv_layers", 0)
    check_number("gemma4.block_count", layers, *INT_RANGES["num_hidden_layers"], whole=True)
    check_number("gemma4.attention.shared_kv_layers", shared, 0, layers - 1, whole=True)
    pattern = given.pop("attention.sliding_window_pattern", None)
    if not isinstance(pattern, list) or len(pattern) != layers:
        raise ValueError(
            f"gemma4.attention.sliding_window_pattern={pattern!r:.60} must be an array of {layers}"
            " values"
        )
    kinds = [SLIDING if windowed else FULL for windowed in pattern]
    return {
        "layer_types": tuple(kinds),
        "num_kv_shared_layers": shared,
        "hidden_size_per_layer_input": given.pop("embedding_length_per_layer_input", 0),
        "query_pre_attn_scalar": 1,
        **_heads(given, kinds),
        **_mlp(given, [i >= layers - shared for i in range(layers)]),
        **_experts(given),
    }


def with_tensors(
    config: GemmaConfig, names: Collection[str], factors: np.ndarray | None
) -> GemmaConfig:
    """Returns the config with the facts that are in the tensors.

    names    the tensors' names in transformers
    factors  the content of `rope_freqs.weight`; None: there is no such tensor
    Raises ValueError if layers differ in what they use as values, or for other divisors.
    """
    full = [i for i, x in enumerate(config.layers) if x.kind == FULL and x.kv_layer == i]
    if not full:
        return config
    without = [i for i in full if f"model.layers.{i}.self_attn.v_proj.weight" not in names]
    if without not in ([], full):
        raise ValueError(
            f"blk.{without[0]} has no attn_v.weight, but other layers of type {FULL} have one: such"
            " a model is not supported; use llama.cpp"
        )
    pairs = config.head_dim_of(FULL) // 2
    turning = 0 if factors is None else int((factors == 1).sum())
    expected = np.where(np.arange(pairs) < turning, 1, STILL).astype(np.float32)
    if factors is None or not np.array_equal(factors, expected):
        raise ValueError(
            f"{ROPE_FACTORS} must be there and have {pairs} values: ones, then 1e30; other rotary"
            " frequencies are not supported: use llama.cpp"
        )
    part = turning / pairs
    if int(part * 2 * pairs // 2) < turning:  # the number of pairs that the factor stands for
        part = math.nextafter(part, 1)
    rope = config.full_rope._replace(rope_type="proportional", partial_rotary_factor=part)
    return replace(config, attention_k_eq_v=bool(without), full_rope=rope)


def _heads(given: dict[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    kv_heads = _by_group(given, "attention.head_count_kv", kinds, given.get("attention.head_count"))
    dims = []
    for key, others in HEAD_DIMS.items():
        dims.append(_take(given, key))
        for other in others:
            if given.get(other, dims[-1]) != dims[-1]:
                raise ValueError(
                    f"gemma4.{other}={given[other]!r:.40} must equal gemma4.{key}={dims[-1]!r:.40}:"
                    " use llama.cpp"
                )
            given.pop(other, None)
    full = kv_heads.get(FULL)
    heads = kv_heads.get(SLIDING, full)
    return {
        "head_dim": dims[1],
        "global_head_dim": None if dims[0] == dims[1] else dims[0],
        "num_key_value_heads": heads,
        "num_global_key_value_heads": None if full == heads else full,
    }


def _take(given: dict[str, Any], key: str, default: Any = None) -> Any:
    value = given.pop(key, default)
    if value is None:
        raise ValueError(f"the GGUF metadata has no gemma4.{key}: convert the model again")
    return value


def _mlp(given: dict[str, Any], shared: Sequence[bool]) -> dict[str, Any]:
    widths = _by_group(given, "feed_forward_length", shared, None)
    own, wide = widths[False], widths.get(True, widths[False])
    if wide != own and not (isinstance(own, int) and wide == 2 * own):
        raise ValueError(
            f"gemma4.feed_forward_length={wide!r:.40} of layers that share keys and values must be"
            f" {own!r:.40}, or twice as much: use llama.cpp"
        )
    return {"intermediate_size": own, "use_double_wide_mlp": wide != own}


def _experts(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of the mixture of experts. Without experts, the other keys have no
    effect."""
    if not given.get("expert_count"):
        for key in EXPERTS.values():
            given.pop(key, None)
        return {}
    found = {name: _take(given, key) for name, key in EXPERTS.items()}
    for name, value in found.items():
        check_number(f"gemma4.{EXPERTS[name]}", value, 1, INT_RANGES[name][1], whole=True)
    return found


def _by_group(
    given: dict[str, Any], key: str, groups: Sequence[Any], default: Any
) -> dict[Any, Any]:
    """Returns group → value of its layers. Removes the key, which has one value or one per layer.

    groups: the group of each layer
    """
    value = _take(given, key, default)
    values = value if isinstance(value, list) else [value] * len(groups)
    if len(values) != len(groups):
        raise ValueError(f"gemma4.{key}={value!r:.60} must have a value for each layer")
    found: dict[Any, Any] = {}
    for i, (group, one) in enumerate(zip(groups, values, strict=True)):
        if found.setdefault(group, one) != one:
            raise ValueError(
                f"gemma4.{key}={one!r:.40} of layer {i} is {found[group]!r:.40} in other layers of"
                " its type: such a model is not supported; use llama.cpp"
            )
    return found
