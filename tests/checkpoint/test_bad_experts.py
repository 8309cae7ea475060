"""Checks that bad experts in safetensors files are refused before weights are read, with an error
that names file and tensor."""

import re

import pytest
import torch
from checkpoints import EXPERTS, random_tensors, stacked, write_safetensors

from gemma_fast.checkpoint.open import open_checkpoint

X = "model.layers.1.experts"
UP, DOWN = f"{X}.gate_up_proj", f"{X}.down_proj"  # [4, 64, 64] and [4, 64, 32]
ONE = f"{X}.3.up_proj.weight"  # [32, 64]


def refused(path, tensors, message: str, **config) -> None:
    kept = {name: x.contiguous() for name, x in tensors.items() if x is not None}
    write_safetensors(path, "gemma4", kept, **EXPERTS | config)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(path)


BAD_STACKS = {
    "missing": (UP, None, f"tensor {X}.0.gate_proj.weight is missing: download"),
    "fewer-experts": (DOWN, (3, 64, 32), r"(3, 64, 32), but the config requires (4, 64, 32)"),
    "more-experts": (UP, (5, 64, 64), r"(5, 64, 64), but the config requires (4, 64, 64)"),
    "no-experts": (UP, (0, 64, 64), r"(0, 64, 64), but the config requires"),
    "only-gate": (UP, (4, 32, 64), r"(4, 32, 64), but the config requires (4, 64, 64)"),
    "narrow": (DOWN, (4, 64, 16), r"(4, 64, 16), but the config requires (4, 64, 32)"),
    "transposed": (DOWN, (4, 32, 64), r"(4, 32, 64), but the config requires (4, 64, 32)"),
    "flat": (DOWN, (256, 32), r"(256, 32), but the config requires (4, 64, 32)"),
    "one-number": (DOWN, (), r"(), but the config requires (4, 64, 32)"),
    "four-dimensions": (DOWN, (4, 1, 64, 32), r"(4, 1, 64, 32), but the config requires"),
}


@pytest.mark.parametrize("case", BAD_STACKS)
def test_tensors_of_all_experts_must_match_the_config(tmp_path, case):
    name, shape, message = BAD_STACKS[case]
    stored = stacked(random_tensors("gemma4", **EXPERTS))
    stored[name] = None if shape is None else torch.ones(shape)
    where = "" if shape is None else re.escape(f"model.safetensors: tensor {name} has shape ")
    refused(tmp_path, stored, where + re.escape(message))


BAD_MATRICES = {
    "missing": ({ONE: None}, f"tensor {ONE} is missing"),
    "index-too-high": ({f"{X}.4.up_proj.weight": (32, 64)}, f"{X}.4.up_proj.weight is unkno"),
    "index-with-zeros": ({f"{X}.003.up_proj.weight": (32, 64)}, "003.up_proj.weight is unk"),
    "index-negative": ({f"{X}.-1.up_proj.weight": (32, 64)}, r"experts.-1.up_proj.weight is unkn"),
    "index-huge": ({f"{X}.{10**30}.up_proj.weight": (32, 64)}, "0.up_proj.weight is unknown"),
    "transposed": ({ONE: (64, 32)}, rf"tensor {ONE} has shape \(64, 32\), but .* \(32, 64\)"),
    "three-dimensions": ({ONE: (1, 32, 64)}, rf"tensor {ONE} has shape \(1, 32, 64\)"),
    "gate-and-up": ({f"{X}.3.gate_up_proj.weight": (64, 64)}, "3.gate_up_proj.weight is unknown"),
    "bias": ({f"{X}.3.up_proj.bias": (32,)}, "experts.3.up_proj.bias is unknown"),
    "both-forms": ({UP: (4, 64, 64)}, rf"tensor {X}\.0\.gate_proj\.weight is in .* as well"),
    "suffix": ({f"{UP}.weight": (4, 64, 64)}, "experts.gate_up_proj.weight is unknown"),
    "router": ({"model.layers.0.router.proj.weight": (64, 4)}, r"\(64, 4\), but .* \(4, 64\)"),
    "router-scale": ({"model.layers.0.router.scale": (4,)}, r"router\.scale has shape \(4,\)"),
    "per-expert-scale": ({"model.layers.0.router.per_expert_scale": None}, "scale is missing"),
    "scale.weight": ({"model.layers.0.router.scale.weight": (64,)}, "scale.weight is unknown"),
    "norm": ({"model.layers.0.pre_feedforward_layernorm_2.weight": None}, "norm_2.weight is missi"),
    "layer": ({"model.layers.7.experts.0.up_proj.weight": (32, 64)}, r"7\.experts.* is unknown"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MATRICES)
def test_tensors_of_one_expert_must_match_the_config(tmp_path, case):
    change, message = BAD_MATRICES[case]
    change = {name: None if shape is None else torch.ones(shape) for name, shape in change.items()}
    refused(tmp_path, random_tensors("gemma4", **EXPERTS) | change, message)


def test_an_expert_that_is_stored_twice_is_refused(tmp_path):
    tensors = random_tensors("gemma4", **EXPERTS)
    both = stacked(tensors) | {ONE: tensors[ONE]}
    refused(tmp_path, both, rf"tensor {ONE} is in .* as well|{ONE}.*as well")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int64], ids=str)
@pytest.mark.parametrize("name", [UP, ONE, "model.layers.0.router.scale"])
def test_other_dtypes_are_refused(tmp_path, name, dtype):
    tensors = random_tensors("gemma4", **EXPERTS)
    stored = tensors if name == ONE else stacked(tensors)
    stored[name] = torch.ones(stored[name].shape).to(dtype)
    refused(tmp_path, stored, rf"model\.safetensors: tensor {name} has dtype")


@pytest.mark.parametrize("form", ["stacked", "one-per-expert"])
def test_experts_of_a_model_without_a_mixture_are_unknown(tmp_path, form):
    tensors = random_tensors("gemma4", **EXPERTS)
    stored = stacked(tensors) if form == "stacked" else tensors
    refused(tmp_path, stored, "is unknown: the config's model has no", enable_moe_block=False)


@pytest.mark.parametrize("experts", [3, 5, 1024])
def test_another_number_of_experts_is_refused(tmp_path, experts):
    stored = stacked(random_tensors("gemma4", **EXPERTS))
    refused(tmp_path, stored, rf"requires \({experts}, ", num_experts=experts)


def test_unchanged_files_open(tmp_path):
    """The other tests change these files."""
    tensors = random_tensors("gemma4", **EXPERTS)
    for stored in (tensors, stacked(tensors)):
        write_safetensors(tmp_path, "gemma4", stored, **EXPERTS)
        open_checkpoint(tmp_path)
