"""Builds tiny random Gemma models. `Twins` contains one model in three implementations:
transformers', this project's, and the reference.

transformers saves the checkpoint that the other two implementations load, so each comparison also
tests loading `config.json` and safetensors. Sizes are unusual on purpose: heads * head_dim is not
hidden_size, query_pre_attn_scalar is not head_dim, windows are short, and soft caps are low enough
to change the results. One model has an output head of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import transformers
from tolerances import logits_error
from torch import Tensor

from gemma_fast.benchmarks.model.transformers_model import transformers_config
from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.checkpoint.random import RandomCheckpoint
from gemma_fast.config import FULL, SLIDING, GemmaConfig, RopeParameters
from gemma_fast.reference import Reference

_SHARED = {
    "vocab_size": 199, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 88,
    "max_position_embeddings": 256, "eos_token_id": 1,
}  # fmt: skip
_GEMMA2 = GemmaConfig(
    model_type="gemma2", query_pre_attn_scalar=20, sliding_window=8, sliding_window_pattern=2,
    attn_logit_softcapping=3.0, final_logit_softcapping=2.0, **_SHARED,
)  # fmt: skip
_GEMMA3 = GemmaConfig(
    model_type="gemma3", query_pre_attn_scalar=20, sliding_window=8, sliding_window_pattern=2,
    full_rope=RopeParameters(1e6, "linear", 8.0), rms_norm_eps=0.01, **_SHARED,
)  # fmt: skip
_GEMMA1 = GemmaConfig(model_type="gemma", query_pre_attn_scalar=32, **_SHARED)
_GEMMA4 = GemmaConfig(
    model_type="gemma4", query_pre_attn_scalar=1, sliding_window=8,
    layer_types=(SLIDING, SLIDING, FULL, SLIDING, FULL),
    full_rope=RopeParameters(1e6, "proportional", partial_rotary_factor=0.25),
    global_head_dim=64, final_logit_softcapping=2.0, rms_norm_eps=0.01,
    **_SHARED | {"num_hidden_layers": 5, "num_key_value_heads": 2},
)  # fmt: skip
# transformers 5.24 fails if layers share keys and values without per-layer embeddings.
_SHARING = {
    "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 16,
}  # fmt: skip
CONFIGS = {
    "gemma-mqa": _GEMMA1,
    "gemma-mha": replace(_GEMMA1, num_key_value_heads=4, tie_word_embeddings=False),
    "gemma2-gqa": replace(_GEMMA2, num_key_value_heads=2),
    "gemma3-mqa": replace(_GEMMA3, num_hidden_layers=7, layer_types=(), sliding_window_pattern=6),
    "gemma3-gqa": replace(_GEMMA3, num_key_value_heads=2, sliding_window=13),
    "gemma4-k-eq-v": replace(_GEMMA4, attention_k_eq_v=True, num_global_key_value_heads=1),
    "gemma4-shared": replace(_GEMMA4, **_SHARING),
    "gemma4-per-layer": replace(_GEMMA4, hidden_size_per_layer_input=16),
    "gemma4-experts": replace(
        _GEMMA4,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        num_experts=6,
        top_k_experts=3,
        moe_intermediate_size=40,
    ),
    "gemma4-all": replace(
        _GEMMA4,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        sliding_window=13,
        vocab_size_per_layer_input=211,
        **_SHARING,
    ),
}


# Largest error of fp32 logits, relative to their RMS.
TOLERANCE = max(logits_error(config, tokens=40) for config in CONFIGS.values())


def two_layers(name: str) -> GemmaConfig:
    """Returns a config of two layers: one has a window (if the family has any), one has none."""
    kinds = CONFIGS[name].layer_types
    return replace(CONFIGS[name], num_hidden_layers=2, layer_types=(max(kinds), min(kinds)))


@dataclass
class Twins:
    """Contains one model in three implementations with equal weights, and its checkpoint's path."""

    hf: transformers.PreTrainedModel
    model: GemmaForCausalLM
    reference: Reference
    path: Path

    @classmethod
    def build(cls, config: GemmaConfig, path: Path) -> Twins:
        hf = random_transformers_model(config)
        hf.save_pretrained(path)
        model = GemmaForCausalLM.from_pretrained(path, device="cpu")
        assert model.config == config
        return cls(hf, model, Reference.from_pretrained(path), path)

    @property
    def config(self) -> GemmaConfig:
        return self.model.config

    def prompt(self, batch: int, tokens: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, self.config.vocab_size, (batch, tokens), generator=generator)


def close(actual: Tensor, expected: Tensor) -> None:
    """Asserts that two fp32 models have the same logits, except for rounding errors."""
    size = float(expected.detach().double().square().mean().sqrt())
    torch.testing.assert_close(actual, expected, atol=TOLERANCE * size, rtol=0)


def refuse(twins: Twins, wrong: Reference) -> None:
    """Fails unless the tolerance detects that the logits of `wrong` are wrong."""
    ids = twins.prompt(2, 40)
    with pytest.raises(AssertionError, match="not close"):
        close(wrong(ids).logits, twins.model(ids).logits)


def rounding_error(logits: Tensor, exact: Tensor, experts: bool) -> Tensor:
    """Returns the RMS error of logits; with experts, that of each token's logits, and the median
    over the tokens, because rounding changes which experts some of them use."""
    squares = (logits.float() - exact).square().mean(-1)
    return squares.sqrt().median() if experts else squares.mean().sqrt()


def left_padded(twins: Twins, counts: list[int]):
    """Returns prompts of these lengths, and their left-padded batch (ids and attention mask)."""
    prompts = [twins.prompt(1, count, seed=count) for count in counts]
    ids = torch.zeros(len(counts), max(counts), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, -prompt.shape[1] :] = prompt
        mask[row, -prompt.shape[1] :] = 1
    return prompts, ids, mask


def random_model(
    config: GemmaConfig, dtype: torch.dtype = torch.float32, seed: int = 0
) -> GemmaForCausalLM:
    return GemmaForCausalLM.from_checkpoint(
        RandomCheckpoint(config, seed), dtype=dtype, device="cpu"
    )


def random_transformers_model(config: GemmaConfig) -> transformers.PreTrainedModel:
    """Returns transformers' model with random weights, in eval mode, with eager attention and
    experts."""
    return randomize(
        transformers.AutoModelForCausalLM.from_config(
            transformers_config(config),
            attn_implementation="eager",
            experts_implementation="eager",
        )
    )


def randomize(hf: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Gives a model of transformers random weights, in eval mode, and returns it."""
    generator = torch.Generator().manual_seed(1)
    gemma4 = hf.config.model_type.startswith("gemma4")
    for name, weight in hf.named_parameters():
        factor = "norm" in name or name.endswith("scale")  # scales: of a router
        std = 0.5 if factor else 1.5 / weight.shape[-1] ** 0.5
        weight.data.normal_(std=std, generator=generator)
        if gemma4 and factor:  # norms multiply by the weight, not by 1 + weight
            weight.data += 1
        if gemma4 and name.endswith(("q_norm.weight", "k_norm.weight")):
            weight.data *= 0.5  # scores of about 10, as tolerances.py assumes
    for name, scalar in hf.named_buffers():
        if name.endswith("layer_scalar"):
            scalar.data.uniform_(0.4, 1.2, generator=generator)
    return hf.eval()
