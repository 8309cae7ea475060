"""Checks that checkpoints of Gemma 4 are read: all classes that transformers saves, their models in
memory, and the weights in files on the hub that no layer uses."""

import json

import pytest
import torch
import transformers
from checkpoints import assert_holds, random_tensors, read, split, write_safetensors
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, close, random_transformers_model
from torch import nn

from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.checkpoint.names import text_name
from gemma_fast.checkpoint.open import open_checkpoint
from gemma_fast.checkpoint.transformers import CLASSES, TransformersCheckpoint
from gemma_fast.reference import Reference

IDS = torch.arange(3, 40)[None]
PLAIN = {
    "vision_config": {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 16,
        "num_attention_heads": 1, "num_key_value_heads": 1, "patch_size": 4,
        "position_embedding_size": 32,
    },
    "audio_config": {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "output_proj_dims": 16,
        "subsampling_conv_channels": [4, 4],
    },
}  # fmt: skip
UNIFIED = {
    "vision_config": {
        "patch_size": 2, "mm_embed_dim": 16, "mm_posemb_size": 8, "output_proj_dims": 16
    },
    "audio_config": {"audio_embed_dim": 16},
}  # fmt: skip


@pytest.fixture(
    scope="module",
    params=[
        "Gemma4For", "Gemma4UnifiedFor", "Gemma4ForConditional", "Gemma4UnifiedForConditional",
        "Gemma4ForConditional with experts",
    ],
)  # fmt: skip
def model(request) -> transformers.PreTrainedModel:
    """Returns a model of each class with random weights. The layers of "gemma4-all" share keys and
    values, and have per-layer embeddings, which the unified class does not have."""
    unified = "Unified" in request.param
    name = "gemma4-k-eq-v" if unified else "gemma4-all"
    name = "gemma4-experts" if "experts" in request.param else name
    text = random_transformers_model(CONFIGS[name])
    if request.param == "Gemma4For":
        return text
    prefix = request.param.split("For")[0]
    config = text.config.to_dict()
    if unified:
        config["model_type"] = "gemma4_unified_text"
        config = transformers.Gemma4UnifiedTextConfig.from_dict(config)
    if "Conditional" in request.param:
        towers = UNIFIED if unified else PLAIN
        config = getattr(transformers, f"{prefix}Config")(text_config=config, **towers)
        kind = getattr(transformers, f"{prefix}ForConditionalGeneration")
    else:
        kind = getattr(transformers, f"{prefix}ForCausalLM")
    hf = kind._from_config(config, attn_implementation="eager").eval()
    part = hf.model.language_model if "Conditional" in request.param else hf.model
    part.load_state_dict(text.model.state_dict())
    hf.tie_weights()
    return hf


def test_every_class_is_known(model):
    assert type(model).__name__ in CLASSES


def test_saved_models_are_read_without_a_warning(model, tmp_path, recwarn):
    model.save_pretrained(tmp_path)
    recwarn.clear()
    loaded = GemmaForCausalLM.from_pretrained(tmp_path, device="cpu")
    reference = Reference.from_pretrained(tmp_path)
    assert not recwarn.list
    expected = model(IDS).logits
    close(loaded(IDS).logits, expected)
    close(reference(IDS).logits, expected)


def test_models_in_memory_are_read(model):
    loaded = GemmaForCausalLM.from_transformers(model)
    close(loaded(IDS).logits, model(IDS).logits)
    embedding = model.get_input_embeddings().weight
    assert loaded.embed_tokens.data_ptr() == embedding.data_ptr()


def test_models_in_memory_and_saved_ones_have_the_same_config_and_weights(model, tmp_path):
    model.save_pretrained(tmp_path)
    saved, memory = open_checkpoint(tmp_path), TransformersCheckpoint(model)
    assert saved.config == memory.config
    assert saved.shapes == memory.shapes
    for name in saved.shapes:
        assert torch.equal(read(saved, name), read(memory, name)), name


def test_weights_of_the_other_parts_are_skipped(model):
    kept = {name for name in model.state_dict() if text_name(name)}
    others = set(model.state_dict()) - kept
    text = (*(f"model.{part}" for part in ("embed", "layers", "norm", "per_layer")), "lm_head")
    assert all(name.replace("language_model.", "").startswith(text) for name in kept)
    towers = ("vision_tower", "audio_tower", "embed_vision", "embed_audio")
    assert all(name.removeprefix("model.").startswith(towers) for name in others)
    assert bool(others) == ("Conditional" in type(model).__name__)


def test_weights_of_keys_and_values_that_no_layer_uses_are_ignored(tmp_path, recwarn):
    tensors, unused = random_tensors("gemma4"), {}
    for i in (2, 3):
        unused |= {f"model.layers.{i}.self_attn.{x}_proj.weight": torch.ones(64, 64) for x in "kv"}
        unused |= {f"model.layers.{i}.self_attn.{x}_norm.weight": torch.ones(32) for x in "kv"}
    write_safetensors(tmp_path, "gemma4", tensors | unused)
    assert_holds(open_checkpoint(tmp_path), tensors)
    split(tmp_path, tensors | unused)
    assert_holds(open_checkpoint(tmp_path), tensors)
    assert not recwarn.list


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.v_proj.weight",  # its values are its keys
        "model.layers.0.self_attn.v_norm.weight",
        "model.layers.4.self_attn.k_proj.weight",
        "model.layers.02.self_attn.k_proj.weight",
        "model.layers.2.self_attn.k_proj.bias",
        "model.layers.2.layer_scalar.weight",
        "model.layers.0.experts.gate_up_proj",
    ],
)
def test_other_weights_that_no_layer_uses_are_refused(tmp_path, name):
    write_safetensors(tmp_path, "gemma4", random_tensors("gemma4") | {name: torch.ones(32)})
    with pytest.raises(ValueError, match=f"tensor {name} is unknown"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.layer_scalar",
        "model.layers.1.self_attn.k_norm.weight",
        "model.embed_tokens_per_layer.weight",
        "model.per_layer_projection_norm.weight",
    ],
)
def test_missing_and_misshapen_weights_are_refused(tmp_path, name):
    tensors = random_tensors("gemma4")
    write_safetensors(tmp_path, "gemma4", {x: t for x, t in tensors.items() if x != name})
    with pytest.raises(ValueError, match=f"tensor {name} is missing"):
        open_checkpoint(tmp_path)
    write_safetensors(tmp_path, "gemma4", tensors | {name: torch.ones(3)})
    with pytest.raises(ValueError, match=rf"tensor {name} has shape \(3,\)"):
        open_checkpoint(tmp_path)


def test_tensors_of_an_automodel_have_no_prefix(tmp_path):
    tensors = write_safetensors(tmp_path, "gemma4")
    stored = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(stored, tmp_path / "model.safetensors")
    assert_holds(open_checkpoint(tmp_path), tensors)


def test_an_output_head_of_its_own_is_read(tmp_path):
    hf = random_transformers_model(CONFIGS["gemma4-all"])
    head = torch.nn.Linear(*reversed(hf.lm_head.weight.shape), bias=False)
    hf.set_output_embeddings(head)
    hf.config.tie_word_embeddings = False
    hf.save_pretrained(tmp_path)
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    assert not json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    expected = hf(IDS).logits
    close(GemmaForCausalLM.from_pretrained(tmp_path, device="cpu")(IDS).logits, expected)
    close(GemmaForCausalLM.from_transformers(hf)(IDS).logits, expected)


def test_bad_layer_scalars_in_memory_are_refused():
    source = random_transformers_model(CONFIGS["gemma4-all"])
    layer = source.model.layers[3]
    changes = [
        (torch.ones(2), r"layers.3.layer_scalar has shape \(2,\), but the config requires \(1,\)"),
        (torch.ones(1, dtype=torch.int8), "layer_scalar is a Tensor of torch.int8"),
        (torch.ones(1, dtype=torch.bfloat16), "several dtypes.*bfloat16"),
        (torch.ones(1, device="meta"), "layer_scalar is on the meta device"),
    ]
    for scalar, message in changes:
        layer.layer_scalar = nn.Buffer(scalar)
        with pytest.raises(ValueError, match=message):
            TransformersCheckpoint(source)
    del layer.layer_scalar
    with pytest.raises(ValueError, match=r"layers\.3\.layer_scalar is missing"):
        TransformersCheckpoint(source)
