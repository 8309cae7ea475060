"""Checks that the experts of a Gemma 4 are read from GGUF files as llama.cpp reads them, and stay
packed, and that bad files are refused."""

import re

import gguf
import numpy as np
import pytest
import torch
from checkpoints import (
    EXPERTS,
    assert_holds,
    gguf_name,
    random_tensors,
    stacked,
    write_gguf,
    write_safetensors,
)
from gguf import GGMLQuantizationType as Type
from gguf.quants import quantize
from gguf_blocks import set_factor, write_quantized
from loaded_gguf import assert_holds as assert_model_holds
from loaded_gguf import loaded

from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.checkpoint.open import open_checkpoint
from gemma_fast.config import FULL, SLIDING
from gemma_fast.kernels.packed import PackedWeight, Packing
from gemma_fast.reference import Reference

INP, UP, DOWN = (f"blk.1.ffn_{x}" for x in ("gate_inp", "gate_up_exps", "down_exps"))
LAYER = "model.layers.1"


def test_names_are_those_of_llama_cpp():
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, 4)
    tensors = stacked(random_tensors("gemma4", **EXPERTS))
    found = {gguf_name(names, name) for name in tensors if name.startswith(LAYER)}
    assert {name for name in found if "ffn" in name or "ffw" in name} == {
        "blk.1.ffn_norm.weight", "blk.1.ffn_gate.weight", "blk.1.ffn_up.weight",
        "blk.1.ffn_down.weight", "blk.1.post_ffw_norm.weight", "blk.1.pre_ffw_norm_2.weight",
        "blk.1.post_ffw_norm_1.weight", "blk.1.post_ffw_norm_2.weight", f"{INP}.weight",
        f"{INP}.scale", f"{UP}.weight", f"{DOWN}.weight", f"{DOWN}.scale",
    }  # fmt: skip


@pytest.mark.parametrize("separate", [False, True])
def test_experts_are_read(tmp_path, separate):
    tensors = write_gguf(tmp_path / "model.gguf", "gemma4", separate=separate, **EXPERTS)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    config = checkpoint.config
    assert (config.num_experts, config.top_k_experts, config.moe_intermediate_size) == (4, 2, 32)
    assert_holds(checkpoint, tensors)
    name = f"{LAYER}.experts.3.gate_proj.weight"
    assert torch.equal(checkpoint.rows(name, 5, 99), tensors[name][5:])


def test_config_and_logits_equal_those_of_a_directory(tmp_path):
    full = {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    rope = {FULL: full, SLIDING: {"rope_theta": 1e4}}
    tensors = write_gguf(tmp_path / "model.gguf", "gemma4", **EXPERTS)
    options = {"final_logit_softcapping": 30.0, "rope_parameters": rope}  # the file's metadata
    write_safetensors(tmp_path, "gemma4", stacked(tensors), **options, **EXPERTS)
    models = [
        GemmaForCausalLM.from_pretrained(path, device="cpu", dtype="float32")
        for path in (tmp_path / "model.gguf", tmp_path)
    ]
    assert models[0].config == models[1].config
    first, second = (model(torch.arange(12)[None]).logits for model in models)
    assert first.isfinite().all() and torch.equal(first, second)


FALLBACK = {"experts.down_proj": Type.Q5_0}  # 32 columns are no block of Q4_K or Q6_K
ONE, TWO = Packing(4, 32, False, torch.float16), Packing(8, 32, False, torch.float16)
MIXED = {
    "Q4_0": ({}, Type.Q4_0, ONE, ONE),
    "Q8_0": ({}, Type.Q8_0, TWO, TWO),
    "Q4_K, Q5_0": (FALLBACK, Type.Q4_K, Packing(4, 32, True, torch.float32), TWO),
    "Q6_K, Q8_0": (
        {"experts.down_proj": Type.Q8_0}, Type.Q6_K, Packing(8, 16, False, torch.float32), TWO
    ),
    "Q4_0, Q5_1": (
        {"experts.down_proj": Type.Q5_1}, Type.Q4_0, ONE, Packing(8, 32, True, torch.float16)
    ),
}  # fmt: skip


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("mixture", MIXED)
def test_experts_stay_packed_exactly(tmp_path, mixture, separate):
    kinds, default, gate_up, down = MIXED[mixture]
    kinds = kinds | {"router": Type.F32}
    path = tmp_path / "model.gguf"
    matrices = write_quantized(path, "gemma4", kinds, default, experts=True, separate=separate)
    model = loaded(path)
    for layer in model.layers:
        assert layer.experts_gate_up_proj.packing == gate_up
        assert layer.experts_down_proj.packing == down
        assert not isinstance(layer.router_proj, PackedWeight)
    assert_model_holds(model, matrices)
    weights = Reference.from_pretrained(path).weights
    for name, expected in matrices.items():
        assert torch.equal(weights[name], expected), name


def test_gate_and_up_of_different_types_are_packed_exactly(tmp_path):
    kinds = {"experts.gate_proj": Type.Q6_K, "experts.up_proj": Type.Q4_K, "router": Type.F16}
    path = tmp_path / "model.gguf"
    matrices = write_quantized(path, "gemma4", kinds, experts=True, separate=True)
    model = loaded(path)
    packing = Packing(8, 16, True, torch.float32)
    assert {layer.experts_gate_up_proj.packing for layer in model.layers} == {packing}
    assert_model_holds(model, matrices)


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0], ids=lambda x: x.name)
def test_the_router_is_never_packed(tmp_path, kind):
    path = tmp_path / "model.gguf"
    matrices = write_quantized(path, "gemma4", {"router": kind}, experts=True)
    for options in ({}, {"quantize": "int4"}, {"quantize": "int8"}):
        model = loaded(path, **options)
        for i, layer in enumerate(model.layers):
            router = matrices[f"model.layers.{i}.router.proj.weight"]
            assert torch.equal(layer.router_proj, router)
            assert isinstance(layer.experts_down_proj, PackedWeight)


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


BAD = {
    "fewer": ({f"{DOWN}.weight": ones(3, 64, 32)}, rf"{DOWN}\.weight .*\(3, .* \(4, 64, 32\)"),
    "transposed": ({f"{UP}.weight": ones(4, 32, 64)}, rf"{UP}\.weight has shape \(4, 32, 64\)"),
    "flat": ({f"{UP}.weight": ones(256, 64)}, rf"{UP}\.weight has shape \(256, 64\)"),
    "missing": ({f"{UP}.weight": None}, r"experts\.0\.gate_proj\.weight is missing"),
    "router-missing": ({f"{INP}.weight": None}, r"layers\.1\.router\.proj\.weight is missing"),
    "scale-missing": ({f"{INP}.scale": None}, r"layers\.1\.router\.scale is missing"),
    "expert-scale-missing": ({f"{DOWN}.scale": None}, r"router\.per_expert_scale is missing"),
    "expert-scale-long": ({f"{DOWN}.scale": ones(5)}, r"per_expert_scale has shape \(5,\)"),
    "twice": ({"blk.1.ffn_up_exps.weight": ones(4, 32, 64)}, r"experts\.0\.up_proj\.weight is in"),
    "one-expert": ({"blk.1.ffn_up.0.weight": ones(32, 64)}, r"ffn_up\.0\.weight is unknown"),
    "bias": ({f"{UP}.bias": ones(4, 64)}, r"ffn_gate_up_exps\.bias is unknown"),
    "scale-of-gate": ({f"{UP}.scale": ones(4)}, r"ffn_gate_up_exps\.scale is unknown"),
    "layer": ({"blk.9.ffn_down_exps.weight": ones(4, 64, 32)}, r"layers\.9\.experts.* is unknown"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_tensors_are_refused(tmp_path, case):
    change, message = BAD[case]
    path = tmp_path / "model.gguf"
    write_gguf(path, "gemma4", extra=change, **EXPERTS)
    with pytest.raises(ValueError, match=rf"model\.gguf: .*{message}"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("expert_count", 0, r"tensor model\.layers\.\d\..* is unknown"),
        ("expert_count", 8, r"requires \(8, "),
        ("expert_count", 1024, r"requires \(1024, "),
        ("expert_count", 60_000, r"gemma4\.expert_count=60000 must be an integer from 1 to 1024"),
        ("expert_used_count", 5, "num_experts=4 with top_k_experts=5"),
        ("expert_feed_forward_length", 64, r"requires \(4, 64, 64\)"),
    ],
)
def test_counts_must_match_the_tensors(tmp_path, key, value, message):
    path = tmp_path / "model.gguf"
    write_gguf(path, "gemma4", keys={f"gemma4.{key}": value}, **EXPERTS)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(path)


def test_truncated_experts_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, "gemma4", **EXPERTS)
    content = path.read_bytes()
    for kept in (len(content) - 4, len(content) * 2 // 3):
        path.write_bytes(content[:kept])
        with pytest.raises(ValueError, match=r"model\.gguf is not a readable GGUF file"):
            open_checkpoint(path)


@pytest.mark.parametrize("quantize_as", [None, "int4"])
@pytest.mark.parametrize("factor", [np.nan, np.inf], ids=str)
def test_a_scale_that_is_not_finite_is_refused_with_the_experts_tensor(
    tmp_path, factor, quantize_as
):
    path, name = tmp_path / "model.gguf", f"{LAYER}.experts.down_proj"
    blocks = quantize(random_tensors("gemma4", **EXPERTS)["model.norm.weight"].numpy(), Type.Q8_0)
    rows = np.tile(blocks[:34], (4 * 64, 1))
    set_factor(rows[130:131], Type.Q8_0, 0, factor)  # of expert 2
    stored = {name: (rows.reshape(4, 64, -1), Type.Q8_0)}
    write_gguf(path, "gemma4", stored=stored, **EXPERTS)
    named = re.escape(f"{LAYER}.experts.2.down_proj.weight")
    with pytest.raises(ValueError, match=rf"tensor {named}: .*(not finite|NaN or infinite)"):
        GemmaForCausalLM.from_pretrained(path, device="cpu", quantize=quantize_as)
