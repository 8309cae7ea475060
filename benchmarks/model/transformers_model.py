"""Creates transformers' model from gemma_fast's config and weights, for benchmarks and tests.

A mistake of gemma_fast's reader is in this model, too. verify/truth.py does not use that reader.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor

from gemma_fast.checkpoint.base import Checkpoint
from gemma_fast.config import FULL, SLIDING, GemmaConfig, RopeParameters

SAME = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "max_position_embeddings", "rms_norm_eps", "bos_token_id",
    "eos_token_id", "pad_token_id", "tie_word_embeddings",
)  # fmt: skip
SAME_IN_GEMMA_2_AND_3 = (
    "query_pre_attn_scalar", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping",
)  # fmt: skip

FIELDS_OF_GEMMA_4 = (
    "final_logit_softcapping", "num_global_key_value_heads", "attention_k_eq_v",
    "num_kv_shared_layers", "use_double_wide_mlp", "hidden_size_per_layer_input",
)  # fmt: skip
FIELDS_OF_EXPERTS = ("num_experts", "top_k_experts", "moe_intermediate_size")
EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def transformers_config(config: GemmaConfig) -> transformers.PreTrainedConfig:
    """Returns transformers' config with the same values."""
    same = {name: getattr(config, name) for name in SAME}
    if isinstance(config.eos_token_id, tuple):
        same["eos_token_id"] = list(config.eos_token_id)
    full, sliding = (_rope(config.rope(kind)) for kind in (FULL, SLIDING))
    if full != sliding and config.model_type not in ("gemma3", "gemma4"):
        raise ValueError(f"transformers' {config.model_type} has one rope for all layers")
    if config.model_type == "gemma":
        # Set explicitly, because some releases use another gelu for Gemma 1 by default.
        same["hidden_act"] = "gelu_pytorch_tanh"
        return transformers.GemmaConfig(rope_parameters=full, **same)
    if config.model_type == "gemma4":
        return _gemma4_config(config, same | {"rope_parameters": {FULL: full, SLIDING: sliding}})
    same |= {name: getattr(config, name) for name in SAME_IN_GEMMA_2_AND_3}
    same["layer_types"] = list(config.layer_types)
    same["hidden_activation"] = "gelu_pytorch_tanh"
    if config.model_type == "gemma2":
        return transformers.Gemma2Config(rope_parameters=full, **same)
    return transformers.Gemma3TextConfig(rope_parameters={FULL: full, SLIDING: sliding}, **same)


def _gemma4_config(config: GemmaConfig, same: dict[str, Any]) -> transformers.PreTrainedConfig:
    same |= {name: getattr(config, name) for name in FIELDS_OF_GEMMA_4}
    same |= {
        "global_head_dim": config.head_dim_of(FULL),
        "vocab_size_per_layer_input": config.vocab_size_per_layer_input or config.vocab_size,
        "sliding_window": config.sliding_window or 1,  # None: no layer has a window
    }
    if config.num_experts:
        same |= {"enable_moe_block": True} | {
            name: getattr(config, name) for name in FIELDS_OF_EXPERTS
        }
    return transformers.Gemma4TextConfig(**same | {"layer_types": list(config.layer_types)})


def _rope(rope: RopeParameters) -> dict[str, Any]:
    """Returns transformers' rope parameters: only the keys that the type has."""
    kind, keys = rope.rope_type, ["rope_type", "rope_theta"]
    keys += {
        "default": [], "linear": ["factor"],
        "yarn": [name for name in rope._fields[2:] if name != "partial_rotary_factor"],
        "proportional": ["partial_rotary_factor"] + ["factor"] * (rope.factor != 1),
    }[kind]  # fmt: skip
    return {key: getattr(rope, key) for key in keys}


def transformers_model(
    checkpoint: Checkpoint, attention: str, dtype: torch.dtype, device: torch.device | str
) -> transformers.PreTrainedModel:
    """Returns transformers' model with the checkpoint's config and weights. It is for random
    weights, which are in no file, and for GGUF, which transformers reads differently.

    attention: "eager" also means eager experts, without transformers' other implementations
    """
    config = transformers_config(checkpoint.config)
    experts = {"experts_implementation": "eager"} if attention == "eager" else {}
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, dtype=dtype, **experts
        )
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())  # layer_scalar: a buffer
    for name in checkpoint.shapes:
        checkpoint.copy(name, find_tensor(tensors, name))
    return model.eval().requires_grad_(False)


def find_tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Returns the tensor of transformers' model that a name of a checkpoint stands for. In the
    model, an expert's matrices are parts of the tensors of all experts."""
    match = EXPERT.fullmatch(name)
    if match is None:
        return tensors[name]
    experts, index, part = match.groups()
    if part == "down":
        return tensors[f"{experts}.down_proj"][int(index)]
    return tensors[f"{experts}.gate_up_proj"][int(index)].chunk(2)[part == "up"]
