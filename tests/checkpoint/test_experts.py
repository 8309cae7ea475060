"""Checks that the experts of a Gemma 4 are read from safetensors files and from models in memory,
one expert at a time."""

import json

import pytest
import torch
import transformers
from checkpoints import (
    EXPERTS,
    assert_holds,
    config_json,
    random_tensors,
    read,
    split,
    stacked,
    write_safetensors,
)
from safetensors.torch import save_file
from tiny_models import CONFIGS, close, random_transformers_model
from torch import nn

from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.checkpoint import safetensors
from gemma_fast.checkpoint.open import open_checkpoint
from gemma_fast.checkpoint.transformers import TransformersCheckpoint
from gemma_fast.reference import Reference

IDS = torch.arange(3, 40)[None]


@pytest.fixture
def source() -> transformers.PreTrainedModel:
    return random_transformers_model(CONFIGS["gemma4-experts"])


@pytest.mark.parametrize("elements", [64, 1 << 22])  # a row at a time, or all of a matrix
@pytest.mark.parametrize("form", ["stacked", "one-per-expert"])
def test_experts_are_read_from_both_forms(tmp_path, form, elements, monkeypatch):
    monkeypatch.setattr(safetensors, "ELEMENTS", elements)
    tensors = random_tensors("gemma4", **EXPERTS)
    stored = stacked(tensors) if form == "stacked" else tensors
    write_safetensors(tmp_path, "gemma4", stored, **EXPERTS)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.num_experts == 4
    assert_holds(checkpoint, tensors)
    name = "model.layers.1.experts.2.up_proj.weight"
    assert torch.equal(checkpoint.rows(name, 5, 99), tensors[name][5:])
    split(tmp_path, stored, 3)
    assert_holds(open_checkpoint(tmp_path), tensors)


def test_experts_of_a_multimodal_file_are_read(tmp_path):
    tensors = random_tensors("gemma4", **EXPERTS)
    stored = {
        name.replace("model.", "model.language_model."): tensor
        for name, tensor in stacked(tensors).items()
    }
    save_file(stored, tmp_path / "model.safetensors")
    config = {"model_type": "gemma4", "text_config": config_json("gemma4", **EXPERTS)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_holds(open_checkpoint(tmp_path), tensors)


def test_saved_models_and_models_in_memory_have_transformers_logits(tmp_path, source, recwarn):
    source.save_pretrained(tmp_path)
    recwarn.clear()
    saved = GemmaForCausalLM.from_pretrained(tmp_path, device="cpu")
    assert saved.config == CONFIGS["gemma4-experts"] and not recwarn.list
    expected = source(IDS).logits
    for model in (
        saved,
        Reference.from_pretrained(tmp_path),
        GemmaForCausalLM.from_transformers(source),
    ):
        close(model(IDS).logits, expected)


def test_experts_in_memory_are_views_of_transformers_parameters(source):
    checkpoint = TransformersCheckpoint(source)
    assert checkpoint.shapes == CONFIGS["gemma4-experts"].tensor_shapes()
    model = GemmaForCausalLM.from_transformers(source)
    for ours, theirs in zip(model.layers, source.model.layers, strict=True):
        for part in ("gate_up_proj", "down_proj"):
            weight = getattr(theirs.experts, part)
            shared = getattr(ours, f"experts_{part}")
            assert shared.data_ptr() == weight.data_ptr()
            assert torch.equal(shared, weight.flatten(0, 1))
        assert ours.router_scale.data_ptr() == theirs.router.scale.data_ptr()
        assert ours.per_expert_scale.data_ptr() == theirs.router.per_expert_scale.data_ptr()
    with torch.no_grad():
        source.model.layers[1].experts.down_proj[2].mul_(3)
    close(model(IDS).logits, source(IDS).logits)


def test_saved_and_live_models_have_the_same_tensors(tmp_path, source):
    source.save_pretrained(tmp_path)
    saved, live = open_checkpoint(tmp_path), TransformersCheckpoint(source)
    assert saved.shapes == live.shapes and saved.config == live.config
    for name in saved.shapes:
        assert torch.equal(read(saved, name), read(live, name)), name


def test_experts_that_are_not_contiguous_are_copied(source):
    experts = source.model.layers[0].experts
    for weight in experts.parameters():
        weight.data = weight.data.mT.contiguous().mT
    model = GemmaForCausalLM.from_transformers(source)
    assert model.layers[0].experts_gate_up_proj.is_contiguous()
    close(model(IDS).logits, source(IDS).logits)


class Quantized(nn.Parameter):
    """A subclass of Parameter, like those of libraries that quantize."""


BAD_MODELS = [
    (lambda x: Quantized(x), "is a Quantized of torch.float32: quantized and distributed"),
    (lambda x: nn.Parameter(x.char(), requires_grad=False), "is a Parameter of torch.int8"),
    (lambda x: nn.Parameter(x.bfloat16()), "several dtypes.*bfloat16"),
    (lambda x: nn.Parameter(x.to("meta")), "is on the meta device"),
    (lambda x: nn.Parameter(x[:5]), r"shape \(5, 48, 40\), but the config requires \(6, 48, 40\)"),
    (lambda x: nn.Parameter(x.flatten(0, 1)), r"has shape \(288, 40\), but the config requires"),
    (lambda x: nn.Parameter(x.mT), r"has shape \(6, 40, 48\), but the config requires"),
    (lambda x: None, "is missing: fused and renamed weights are not supported"),
]


@pytest.mark.parametrize("case", range(len(BAD_MODELS)), ids=[x[1][:20] for x in BAD_MODELS])
def test_bad_experts_in_memory_are_refused(source, case):
    change, message = BAD_MODELS[case]
    experts = source.model.layers[3].experts
    experts.down_proj = change(experts.down_proj.data)
    with pytest.raises(ValueError, match=rf"layers\.3\.experts\.down_proj.*{message}|{message}"):
        GemmaForCausalLM.from_transformers(source)
