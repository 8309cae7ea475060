"""llama.cpp's rules for GGUF files of Gemma 4: what gguf_truth.py does not read as in Gemma 1 to 3.

The rules are those of src/models/gemma4.cpp. Some of them are about tensors: the divisors of the
rotary frequencies are in rope_freqs, layers without attn_v use their keys as values, and gate and
up of all experts are in one tensor or in two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gguf
import numpy as np
import transformers
from torch import Tensor

FULL, SLIDING = "full_attention", "sliding_attention"
FACTORS = "rope_freqs.weight"
OPTIONAL = {"layer_scalar", "per_expert_scale"}  # 1 where the file has no tensor for it
SCALES = {"router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale"}


def config_of(
    keys: Mapping[str, Any], heads: int, rope: Mapping[str, Any], **sizes: Any
) -> transformers.PreTrainedConfig:
    """Returns transformers' config. `read_tensors` adds what the tensors say.

    keys   metadata without "gemma4."
    heads  query heads of all layers
    rope   rope parameters of full layers, as if all pairs rotate
    sizes  fields of the config that the tensors' shapes say
    """
    layers, shared = keys["block_count"], keys.get("attention.shared_kv_layers", 0)
    pattern = of_layers(keys, "attention.sliding_window_pattern", layers)
    kinds = [SLIDING if window else FULL for window in pattern]
    own = layers - shared
    # Shared layers read the last two layers with keys and values; transformers, the last per type.
    if kinds[-1] != FULL or (shared and kinds[own - 2 : own] != [SLIDING, FULL]):
        raise ValueError(f"transformers' Gemma 4 has no layers of the types {kinds}")
    widths = of_layers(keys, "feed_forward_length", layers)
    double = [widths[0] * (2 if i >= own else 1) for i in range(layers)]
    if widths not in (double, [widths[0]] * layers):
        raise ValueError(f"transformers' Gemma 4 has no feed_forward_length {widths}")
    head_dims = {FULL: head_dim(keys, ""), SLIDING: head_dim(keys, "_swa")}
    kv_heads = of_layers(keys, "attention.head_count_kv", layers, heads)
    shapes: dict[str, Any] = {
        "per_layer_config": {
            i: {"head_dim": head_dims[kind], "num_key_value_heads": kv_heads[i]}
            for i, kind in enumerate(kinds)
        }
    }
    return transformers.Gemma4TextConfig(
        hidden_size=keys["embedding_length"], num_hidden_layers=layers, layer_types=kinds,
        num_attention_heads=heads, num_key_value_heads=kv_heads[0], head_dim=head_dims[SLIDING],
        num_kv_shared_layers=shared, intermediate_size=widths[0],
        use_double_wide_mlp=bool(shared) and widths == double,
        hidden_size_per_layer_input=keys["embedding_length_per_layer_input"],
        vocab_size_per_layer_input=sizes["vocab_size"],
        sliding_window=keys["attention.sliding_window"],
        rms_norm_eps=keys["attention.layer_norm_rms_epsilon"],
        max_position_embeddings=keys["context_length"],
        final_logit_softcapping=keys.get("final_logit_softcapping", 30.0) or None,
        hidden_activation="gelu_pytorch_tanh", **experts_of(keys), rope_parameters={
            FULL: {**rope, "rope_type": "proportional", "partial_rotary_factor": 1.0},
            SLIDING: {
                "rope_type": "default", "rope_theta": keys.get("rope.freq_base_swa", 10_000.0)
            },
        }, **shapes, **sizes,
    )  # fmt: skip


def experts_of(keys: Mapping[str, Any]) -> dict[str, Any]:
    if not keys.get("expert_count"):
        return {}
    return {
        "enable_moe_block": True, "num_experts": keys["expert_count"],
        "top_k_experts": keys["expert_used_count"],
        "moe_intermediate_size": keys["expert_feed_forward_length"],
    }  # fmt: skip


def stored_parts(
    name: str, weight: Tensor, stored_name: str, tensors: Mapping[str, gguf.ReaderTensor]
) -> dict[str, Tensor]:
    """Returns stored tensor → the part of a weight of transformers' model that it contains.

    stored_name: that of the package gguf, which does not know the scales of a router
    """
    layer, _, part = name.removeprefix("model.layers.").partition(".")
    if part in SCALES:
        return {f"blk.{layer}.{SCALES[part]}": weight}
    if part == "experts.gate_up_proj" and stored_name not in tensors:
        halves = zip(("gate", "up"), weight.chunk(2, dim=1), strict=True)
        return {f"blk.{layer}.ffn_{half}_exps.weight": matrices for half, matrices in halves}
    return {stored_name: weight}


def read_tensors(
    config: transformers.PreTrainedConfig, tensors: Mapping[str, gguf.ReaderTensor]
) -> set[str]:
    """Adds to the config what the tensors say. Returns the names of tensors that are no weights of
    transformers' model: rope_freqs, and keys and values of layers that read an earlier layer's."""
    full = [i for i, kind in enumerate(config.layer_types) if kind == FULL]
    own = config.num_hidden_layers - config.num_kv_shared_layers
    if FACTORS not in tensors:
        raise ValueError(f"the file has no tensor {FACTORS}")
    factors = np.array(tensors[FACTORS].data)
    pairs = config.per_layer_config[full[0]].head_dim // 2
    turning = int((factors == 1).sum())
    if (
        factors.shape != (pairs,)
        or (factors[:turning] != 1).any()
        or (factors < 1e29)[turning:].any()
    ):
        raise ValueError(f"transformers' Gemma 4 has no {FACTORS} {factors}")
    # transformers rounds the number of pairs down.
    config.rope_parameters[FULL]["partial_rotary_factor"] = min((turning + 0.25) / pairs, 1.0)
    config.attention_k_eq_v = f"blk.{full[0]}.attn_v.weight" not in tensors
    parts = ("attn_k", "attn_v", "attn_k_norm")
    shared = range(own, config.num_hidden_layers)
    return {FACTORS} | {f"blk.{i}.{part}.weight" for i in shared for part in parts}


def of_layers(
    keys: Mapping[str, Any], name: str, layers: int, default: int | None = None
) -> Sequence[Any]:
    """Returns the value of each layer, of a key that has one value or a list."""
    value = keys.get(name, default) if default is not None else keys[name]
    values = value if isinstance(value, list) else [value] * layers
    if len(values) != layers:
        raise ValueError(f"{name} has {len(values)} values for {layers} layers")
    return values


def head_dim(keys: Mapping[str, Any], suffix: str) -> int:
    """Returns the head dim of full layers, or of layers with a window ("_swa")."""
    found = keys[f"attention.key_length{suffix}"]
    for name in ("attention.value_length", "rope.dimension_count"):
        if keys.get(name + suffix, found) != found:
            raise ValueError(f"{name}{suffix} {keys[name + suffix]} is not the head dim {found}")
    return int(found)
