"""Checks that valid checkpoints are read, with every layout of a safetensors directory. Also checks
the peak of host memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import (
    ALL_FAMILIES,
    EXPERTS,
    assert_holds,
    config_json,
    random_tensors,
    read,
    split,
    stacked,
    write_gguf,
    write_safetensors,
)
from gguf import GGMLQuantizationType as Type
from safetensors import safe_open
from safetensors.torch import save_file

from gemma_fast.checkpoint import safetensors_reader
from gemma_fast.checkpoint.config_json import config_from_json
from gemma_fast.checkpoint.open import open_checkpoint

ROOT = Path(__file__).parents[2]
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_single_safetensors_file_is_read(tmp_path, family):
    tensors = write_safetensors(tmp_path, family)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.model_type == family
    assert checkpoint.path == tmp_path
    assert checkpoint.generation_config == {}
    assert_holds(checkpoint, tensors)


@pytest.mark.parametrize("stored", FLOATS, ids=str)
@pytest.mark.parametrize("wanted", FLOATS, ids=str)
def test_tensors_are_converted_to_the_requested_dtype(tmp_path, stored, wanted):
    tensors = write_safetensors(tmp_path, tensors=random_tensors("gemma3", stored))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.dtype == stored
    name = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(
        read(checkpoint, name, wanted), tensors[name].to(wanted), rtol=0, atol=0
    )


def test_dtype_of_a_mixed_checkpoint_is_that_of_the_embedding(tmp_path):
    norm = {"model.norm.weight": torch.ones(64, dtype=torch.float32)}
    tensors = random_tensors("gemma3", torch.bfloat16) | norm
    write_safetensors(tmp_path, tensors=tensors)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.dtype == torch.bfloat16
    assert_holds(checkpoint, tensors)


def test_tensor_is_copied_into_part_of_a_parameter(tmp_path):
    tensors = write_safetensors(tmp_path)
    fused = torch.nn.Parameter(torch.full((192, 64), torch.nan))
    name = "model.layers.0.mlp.up_proj.weight"
    open_checkpoint(tmp_path).copy(name, fused[96:])
    torch.testing.assert_close(fused[96:], tensors[name], rtol=0, atol=0, check_stride=False)
    assert fused[:96].isnan().all()


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_shards_are_read(tmp_path, shards):
    tensors = write_safetensors(tmp_path)
    split(tmp_path, tensors, shards)
    assert_holds(open_checkpoint(tmp_path), tensors)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_text_model_of_a_multimodal_checkpoint_is_read(tmp_path, prefix):
    tensors = write_safetensors(tmp_path)
    stored = {prefix + name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    for name in (
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "multi_modal_projector.mm_input_projection_weight",
        "model.vision_tower.vision_model.head.weight",
        "model.multi_modal_projector.mm_soft_emb_norm.weight",
    ):
        stored[name] = torch.zeros(3, dtype=torch.int8)
    save_file(stored, tmp_path / "model.safetensors")
    config = {"model_type": "gemma3", "text_config": config_json("gemma3")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_holds(open_checkpoint(tmp_path), tensors)
    split(tmp_path, stored)
    assert_holds(open_checkpoint(tmp_path), tensors)


def test_tensors_of_an_automodel_have_no_prefix(tmp_path):
    tensors = write_safetensors(tmp_path)
    stored = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(stored, tmp_path / "model.safetensors")
    assert_holds(open_checkpoint(tmp_path), tensors)


def test_tensors_that_are_no_weights_are_skipped_with_one_warning(tmp_path):
    tensors = random_tensors("gemma3")
    other = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.embed_tokens.embed_scale")
    other += ("v_head.summary.weight", "v_head.summary.bias", "score.weight")
    write_safetensors(tmp_path, tensors=tensors | {name: torch.ones(3) for name in other})
    with pytest.warns(UserWarning, match="5 tensors are no weights of the model") as caught:
        assert_holds(open_checkpoint(tmp_path), tensors)
    assert len(caught) == 1


def test_dtype_of_the_config_comes_before_that_of_the_tensors(tmp_path):
    write_safetensors(tmp_path, tensors=random_tensors("gemma", torch.bfloat16), family="gemma")
    config = json.loads((tmp_path / "config.json").read_text())
    for name, dtype in {"dtype": "float32", "torch_dtype": "float16"}.items():
        (tmp_path / "config.json").write_text(json.dumps(config | {name: dtype}))
        assert open_checkpoint(tmp_path).dtype == getattr(torch, dtype)
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "float8_e4m3fn"}))
    with pytest.raises(ValueError, match="dtype 'float8_e4m3fn' is not supported"):
        open_checkpoint(tmp_path)


def test_generation_config_is_read(tmp_path):
    write_safetensors(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 106]}')
    assert open_checkpoint(tmp_path).generation_config == {"eos_token_id": [1, 106]}


def test_a_file_that_has_become_shorter_is_refused(tmp_path):
    write_safetensors(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    name = max(checkpoint.stored, key=lambda name: checkpoint.stored[name].offset)
    with pytest.raises(ValueError, match=rf"model\.safetensors: tensor {name} cannot be read"):
        read(checkpoint, name)


@pytest.mark.parametrize("padding", range(8))
def test_tensors_may_begin_at_any_byte(tmp_path, padding):
    tensors = write_safetensors(tmp_path, tensors=random_tensors("gemma3", torch.bfloat16))
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size] + b" " * padding
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    assert_holds(open_checkpoint(tmp_path), tensors)


def test_the_header_is_parsed_once(tmp_path, monkeypatch):
    """With 34,000 tensors in a file, parsing it for each would take half an hour."""
    opened = []

    def watched(*args):
        opened.append(args)
        return safe_open(*args)

    monkeypatch.setattr(safetensors_reader, "safe_open", watched)
    tensors = write_safetensors(tmp_path, "gemma4", **EXPERTS)
    assert_holds(open_checkpoint(tmp_path), tensors)
    assert len(opened) == 1


STATUS = Path("/proc/self/status")
BIG = {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4}
PER_LAYER = {"vocab_size_per_layer_input": 8192, "hidden_size_per_layer_input": 512}
MANY_EXPERTS = PER_LAYER | EXPERTS | {"num_experts": 12, "moe_intermediate_size": 1024}
LOAD = """
import re, sys, torch
from gemma_fast.checkpoint.open import open_checkpoint

def status(field):
    with open("/proc/self/status") as file:
        return int(re.search(field + r":\\s+(\\d+) kB", file.read())[1]) * 1024

checkpoint = open_checkpoint(sys.argv[1])
before = status("VmRSS")
model = {}
for name, shape in checkpoint.shapes.items():
    model[name] = torch.empty(shape, dtype=torch.bfloat16)
    checkpoint.copy(name, model[name])
print(status("VmHWM") - before)  # not ru_maxrss, which a child inherits from its parent
"""


@pytest.mark.skipif(
    not STATUS.is_file() or "VmHWM" not in STATUS.read_text(), reason="the system has no VmHWM"
)
@pytest.mark.parametrize("model", ["gemma3", "gemma4", "gemma4-experts"])
@pytest.mark.parametrize("form", ["safetensors", "gguf"])
def test_host_memory_stays_below_the_model_plus_twice_its_largest_tensor(tmp_path, form, model):
    """Tensors of all experts are larger than that. One expert is read at a time."""
    sizes = BIG | {"gemma3": {}, "gemma4": PER_LAYER, "gemma4-experts": MANY_EXPERTS}[model]
    family = model.removesuffix("-experts")
    shapes = config_from_json(config_json(family, **sizes)).tensor_shapes()
    tensors = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}
    if form == "gguf":
        path = tmp_path / "model.gguf"
        write_gguf(path, family, tensors, quantize=lambda t: (t.numpy(), Type.F16), **sizes)
    else:
        path = tmp_path
        write_safetensors(path, family, stacked(tensors), **sizes)
    run = subprocess.run(
        [sys.executable, "-c", LOAD, path], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    nbytes = [tensor.nbytes for tensor in tensors.values()]
    assert int(run.stdout) < sum(nbytes) + 2 * max(nbytes)
