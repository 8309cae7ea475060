"""Tests that transformers_model carries everything of our config and checkpoint."""

import re
from dataclasses import MISSING, fields, replace

import pytest
import torch
from checkpoints import read
from tiny_models import CONFIGS

from gemma_fast.benchmarks.model.transformers_model import (
    find_tensor,
    transformers_config,
    transformers_model,
)
from gemma_fast.checkpoint.config_json import config_from_json
from gemma_fast.checkpoint.random import RandomCheckpoint
from gemma_fast.config import FULL, SLIDING, RopeParameters

_OTHERS = {
    "bos_token_id": 5, "eos_token_id": (6, 7), "pad_token_id": 8, "rms_norm_eps": 1e-3,
    "max_position_embeddings": 99,
}  # fmt: skip
YARN = RopeParameters(2e4, "yarn", 4.0, 64, 1.1, 2.0, 0.5, False)
VARIANTS = {
    "gemma": replace(CONFIGS["gemma-mha"], full_rope=YARN, sliding_rope=YARN, **_OTHERS),
    "gemma2": replace(
        CONFIGS["gemma2-gqa"], layer_types=(FULL, SLIDING, SLIDING), full_rope=RopeParameters(2e4),
        sliding_rope=RopeParameters(2e4), **_OTHERS,
    ),
    "gemma3": replace(
        CONFIGS["gemma3-gqa"], full_rope=YARN._replace(truncate=True), final_logit_softcapping=9.0,
        sliding_rope=RopeParameters(3e4, "linear", 2.0), layer_types=(FULL, SLIDING, SLIDING),
        **_OTHERS,
    ),
    "gemma4": replace(
        CONFIGS["gemma4-all"], layer_types=(FULL, SLIDING, SLIDING, SLIDING, FULL),
        full_rope=RopeParameters(2e6, "proportional", 2.0, partial_rotary_factor=0.5),
        sliding_rope=RopeParameters(3e4, "linear", 2.0), **_OTHERS,
    ),
    "experts": CONFIGS["gemma4-experts"],
}  # fmt: skip


@pytest.mark.parametrize("family", VARIANTS)
def test_config_is_the_same_after_a_round_trip(family):
    assert config_from_json(transformers_config(VARIANTS[family]).to_dict()) == VARIANTS[family]


def test_variants_change_every_field_of_the_config():
    defaults = {f.name: f.default for f in fields(CONFIGS["gemma-mha"])}
    for name, default in defaults.items():
        changed = [getattr(config, name) != default for config in VARIANTS.values()]
        assert default is MISSING or any(changed), f"{name}: add it to a variant"


@pytest.mark.parametrize("name", ["gemma3-gqa", "gemma4-all", "gemma4-experts"])
def test_every_weight_of_the_checkpoint_is_in_the_model(name):
    """Also those that are no parameters: layer_scalar of Gemma 4 is a buffer. The matrices of all
    experts are in two parameters."""
    checkpoint = RandomCheckpoint(CONFIGS[name])
    state = transformers_model(checkpoint, "sdpa", torch.bfloat16, "cpu").state_dict()
    left = {key: x.numel() for key, x in state.items() if key != "lm_head.weight"}
    for tensor in checkpoint.shapes:
        found, right = find_tensor(state, tensor), read(checkpoint, tensor, torch.bfloat16)
        assert torch.equal(found, right), tensor
        key = re.sub(r"experts\.\d+\.(gate|up)_proj.weight", "experts.gate_up_proj", tensor)
        left[re.sub(r"experts\.\d+\.down_proj.weight", "experts.down_proj", key)] -= right.numel()
    assert not any(left.values())


def test_output_head_of_its_own_is_carried():
    checkpoint = RandomCheckpoint(replace(CONFIGS["gemma3-gqa"], tie_word_embeddings=False))
    model = transformers_model(checkpoint, "eager", torch.float32, "cpu")
    for name, weight in (
        ("lm_head.weight", model.lm_head.weight),
        ("model.embed_tokens.weight", model.get_input_embeddings().weight),
    ):
        assert torch.equal(weight, read(checkpoint, name)), name
    ids = torch.tensor([[2, 5, 9]])
    tied = transformers_model(
        RandomCheckpoint(CONFIGS["gemma3-gqa"]), "eager", torch.float32, "cpu"
    )
    assert not torch.allclose(model(ids).logits, tied(ids).logits, atol=1e-3)
