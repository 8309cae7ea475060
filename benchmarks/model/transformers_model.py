"""Creates transformers' model from gemma_fast's config and weights, for benchmarks and tests.

A mistake of gemma_fast's reader is in this model, too. verify/truth.py does without that reader.
"""

from __future__ import annotations

import torch
import transformers

from gemma_fast.checkpoint.base import Checkpoint
from gemma_fast.config import FULL, SLIDING, GemmaConfig

SAME = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "max_position_embeddings", "rms_norm_eps", "bos_token_id",
    "eos_token_id", "pad_token_id",
)  # fmt: skip
SAME_IN_GEMMA_2_AND_3 = (
    "query_pre_attn_scalar", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping",
)  # fmt: skip


def transformers_config(config: GemmaConfig) -> transformers.PreTrainedConfig:
    """Returns transformers' config with the same values."""
    same = {name: getattr(config, name) for name in SAME}
    if isinstance(config.eos_token_id, tuple):
        same["eos_token_id"] = list(config.eos_token_id)
    same["tie_word_embeddings"] = getattr(config, "tie_word_embeddings", True)
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.model_type == "gemma":
        # Set explicitly, because some releases use another gelu for Gemma 1 by default.
        same["hidden_act"] = "gelu_pytorch_tanh"
        return transformers.GemmaConfig(rope_parameters=rope, **same)
    same |= {name: getattr(config, name) for name in SAME_IN_GEMMA_2_AND_3}
    same["layer_types"] = list(config.layer_types)
    same["hidden_activation"] = "gelu_pytorch_tanh"
    if config.model_type == "gemma2":
        return transformers.Gemma2Config(rope_parameters=rope, **same)
    if config.rope_scaling_factor != 1:
        rope |= {"rope_type": "linear", "factor": config.rope_scaling_factor}
    local = {"rope_type": "default", "rope_theta": config.rope_local_base_freq}
    return transformers.Gemma3TextConfig(rope_parameters={FULL: rope, SLIDING: local}, **same)


def transformers_model(
    checkpoint: Checkpoint, attention: str, dtype: torch.dtype, device: torch.device | str
) -> transformers.PreTrainedModel:
    """Returns transformers' model with the checkpoint's config and weights. Random weights are in
    no file that transformers could read, and it reads GGUF in another way than llama.cpp."""
    config = transformers_config(checkpoint.config)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, dtype=dtype
        )
    parameters = dict(model.named_parameters())
    for name in checkpoint.shapes:
        checkpoint.copy(name, parameters[name])
    return model.eval().requires_grad_(False)
