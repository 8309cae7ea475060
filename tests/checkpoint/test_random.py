"""Tests that models with random weights compute something: logits that depend on the tokens."""

import zlib
from dataclasses import replace

import pytest
import torch
from checkpoints import read
from tiny_models import CONFIGS

from gemma_fast.benchmarks.measure.outcome import error
from gemma_fast.checkpoint.random import RandomCheckpoint
from gemma_fast.presets import PRESETS
from gemma_fast.reference import Reference


@pytest.mark.parametrize("name", [x for x in CONFIGS if not x.startswith("gemma4")])
def test_values_of_gemma_1_to_3_are_normal_numbers_of_mean_0(name):
    """Results in benchmarks/results were measured with these weights."""
    checkpoint = RandomCheckpoint(CONFIGS[name], seed=3)
    for tensor, shape in checkpoint.shapes.items():
        generator = torch.Generator().manual_seed(3 + zlib.crc32(tensor.encode()))
        expected = torch.empty(shape).normal_(std=0.02, generator=generator)
        assert torch.equal(read(checkpoint, tensor), expected), tensor


def test_factors_of_gemma_4_have_the_means_of_a_trained_model():
    layer = "model.layers.4."
    checkpoint = RandomCheckpoint(PRESETS["gemma-4-26b-a4b"])
    for name, mean in {
        f"{layer}router.scale": 100, f"{layer}router.per_expert_scale": 1,
        f"{layer}router.proj.weight": 0, f"{layer}pre_feedforward_layernorm_2.weight": 1,
        f"{layer}post_feedforward_layernorm_1.weight": 1,
        f"{layer}post_feedforward_layernorm_2.weight": 0.25, f"{layer}layer_scalar": 1,
        f"{layer}experts.127.down_proj.weight": 0,
    }.items():  # fmt: skip
        assert float(read(checkpoint, name).mean()) == pytest.approx(mean, abs=0.08), name
    checkpoint = RandomCheckpoint(PRESETS["gemma-4-e2b"])  # layer 4 is full: its head dim is 512
    for name, mean in {
        f"{layer}input_layernorm.weight": 1, f"{layer}post_per_layer_input_norm.weight": 1,
        f"{layer}layer_scalar": 1, f"{layer}self_attn.q_norm.weight": 512**-0.25,
        "model.layers.0.self_attn.k_norm.weight": 256**-0.25,
        f"{layer}per_layer_input_gate.weight": 0, "model.norm.weight": 1,
    }.items():  # fmt: skip
        assert float(read(checkpoint, name).mean()) == pytest.approx(mean, abs=0.08), name


@pytest.mark.parametrize("name", ["gemma-4-e2b", "gemma-4-12b", "gemma-4-26b-a4b"])
def test_logits_of_a_deep_gemma_4_depend_on_the_context_and_bfloat16_keeps_them(name):
    """The published layers in a narrow model: rounding errors grow from layer to layer."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "vocab_size": 500}
    if PRESETS[name].num_experts:
        sizes |= {"num_experts": 16, "top_k_experts": 4, "moe_intermediate_size": 64}
    config = replace(PRESETS[name], num_attention_heads=2, num_key_value_heads=1, **sizes)
    rounded = Reference.from_checkpoint(
        RandomCheckpoint(config), dtype=torch.bfloat16, device="cpu"
    )
    exact = Reference(config, {x: weight.float() for x, weight in rounded.weights.items()})
    ids = torch.randint(3, 500, (1, 32), generator=torch.Generator().manual_seed(0))
    logits = exact(ids).logits
    assert error(rounded(ids).logits, logits) < 0.06
    other = exact(torch.cat((ids[:, 16:], ids[:, 16:]), dim=1)).logits
    assert error(other[:, 16:], logits[:, 16:]) > 0.5, "attention must have an effect"
    assert len(set(logits[0].argmax(-1).tolist())) > 4, "most tokens must not be the same"
