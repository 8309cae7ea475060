"""Checks experts that are quantized, one tensor each, by compressed-tensors, and those that are
rounded while they are read."""

import warnings
from dataclasses import replace

import pytest
import torch
from checkpoints import read
from compressed_models import NOT_PACKED, SCHEMES, save_compressed, with_linear_experts
from loaded_gguf import weights
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, close, random_transformers_model

from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.checkpoint.open import open_checkpoint
from gemma_fast.checkpoint.rounded import RoundedCheckpoint, round_groups
from gemma_fast.kernels.packed import PackedWeight, Packing
from gemma_fast.reference import Reference

IDS = torch.arange(3, 40)[None]
EXPERT = "model.layers.2.experts.5.down_proj"
PACKINGS = {
    "w4a16-g32": Packing(4, 32, False, torch.bfloat16),
    "w4a16-g32-asymmetric": Packing(4, 32, True, torch.float32),
    "w8a16-channel": Packing(8, 128, False, torch.bfloat16),
    "w8a8": Packing(8, 128, False, torch.bfloat16),
    "nvfp4a16": Packing(8, 16, False, torch.float32),
    "mxfp4a16": Packing(8, 32, False, torch.bfloat16),
}
IGNORED = ("lm_head", "re:.*router.*")


def tiny(width: int = 128):
    config = replace(CONFIGS["gemma4-experts"], hidden_size=128, intermediate_size=256)
    config = replace(config, moe_intermediate_size=width)
    return random_transformers_model(config).to(torch.bfloat16)


def save(path, scheme: str, ignore=IGNORED, width: int = 128) -> dict[str, torch.Tensor]:
    """Returns the quantized weights in fp32."""
    group = {"targets": ["Linear"], **SCHEMES[scheme]}
    hf = with_linear_experts(tiny(width))
    return save_compressed(hf, path, {"group": group}, ignore)[1]


def quietly(function, *args, **options):
    """Calls the function without its warnings, which have tests of their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **options)


def loaded(path, **options) -> GemmaForCausalLM:
    options |= {"device": "cpu", "dtype": "float32"}
    return quietly(GemmaForCausalLM.from_pretrained, path, **options)


@pytest.mark.parametrize("scheme", [*PACKINGS, "fp8-dynamic", "fp8-block"])
def test_quantized_experts_have_the_librarys_values(tmp_path, scheme):
    expected = save(tmp_path, scheme)
    assert len(expected) == 5 * (7 + 6 * 3) - 2  # layers with their values as keys have no v_proj
    model = loaded(tmp_path)
    reference = quietly(Reference.from_pretrained, tmp_path)
    found, error = weights(model), 2e-6 if "asymmetric" in scheme else 0
    for name, weight in expected.items():
        assert reference.weights[name].equal(weight), name
        torch.testing.assert_close(found[name], weight, rtol=0, atol=error)
    for layer in model.layers:
        assert not isinstance(layer.router_proj, PackedWeight)
        packed = layer.experts_gate_up_proj, layer.experts_down_proj
        for weight in packed:
            assert isinstance(weight, PackedWeight) == (scheme not in NOT_PACKED)
            assert scheme in NOT_PACKED or weight.packing == PACKINGS[scheme]
    close(model(IDS).logits, reference(IDS).logits)


def test_a_router_that_is_quantized_is_unpacked(tmp_path, recwarn):
    expected = save(tmp_path, "w4a16-g32", ignore=("lm_head",))
    recwarn.clear()
    model = GemmaForCausalLM.from_pretrained(tmp_path, device="cpu", dtype="float32")
    assert not recwarn.list
    for i, layer in enumerate(model.layers):
        router = expected[f"model.layers.{i}.router.proj.weight"]
        assert torch.equal(layer.router_proj, router)


def test_a_layer_whose_experts_are_not_all_quantized_is_unpacked_with_a_warning(tmp_path):
    expected = save(tmp_path, "w8a16-channel", ignore=(*IGNORED, EXPERT))
    assert f"{EXPERT}.weight" not in expected
    with pytest.warns(UserWarning, match="1 matmuls are unpacked") as caught:
        model = GemmaForCausalLM.from_pretrained(tmp_path, device="cpu", dtype="float32")
    assert f"but {EXPERT}.weight cannot" in str(caught[0].message)
    assert not isinstance(model.layers[2].experts_down_proj, PackedWeight)
    assert isinstance(model.layers[2].experts_gate_up_proj, PackedWeight)
    assert isinstance(model.layers[1].experts_down_proj, PackedWeight)
    found = weights(model)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


BAD = {
    "packed-missing": ("packed", lambda x: None, "_packed is missing, but pack-quantized"),
    "scale-missing": ("scale", lambda x: None, "_scale is missing"),
    "shape-missing": ("shape", lambda x: None, "_shape is missing"),
    "scale-short": ("scale", lambda x: x[:-1], r"_scale has .* shape \(127, 4\)"),
    "transposed": ("packed", lambda x: x.T.contiguous(), r"_packed has .* \(16, 128\)"),
    "stacked": (
        "packed",
        lambda x: x.expand(6, *x.shape).clone(),
        r"_packed has .* \(6, 128, 16\)",
    ),
    "shape-other": ("shape", lambda x: x * 2, r"_packed has .* requires I32 and \(256, 32\)"),
    "scale-int": ("scale", lambda x: x.int(), "_scale has dtype I32"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tensors_of_a_quantized_expert_are_refused(tmp_path, case):
    suffix, change, message = BAD[case]
    save(tmp_path, "w4a16-g32")
    file, name = tmp_path / "model.safetensors", f"{EXPERT}.weight_{suffix}"
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file({name: x for name, x in tensors.items() if x is not None}, file)
    with pytest.raises(ValueError, match=rf"model\.safetensors: tensor {EXPERT}\.weight{message}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("change", ["nan", "missing", "beyond", "zeros"])
def test_other_bad_experts_are_refused(tmp_path, change):
    save(tmp_path, "w4a16-g32")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    parts = {name: x for name, x in tensors.items() if name.startswith(f"{EXPERT}.")}
    if change == "nan":
        tensors[f"{EXPERT}.weight_scale"][3, 1] = torch.nan
        message = f"tensor {EXPERT}.weight_scale is not finite"
    elif change == "missing":
        tensors = {name: x for name, x in tensors.items() if name not in parts}
        message = f"tensor {EXPERT}.weight is missing"
    else:
        index = {"beyond": "6", "zeros": "005"}[change]
        other = EXPERT.replace("experts.5", f"experts.{index}")
        tensors |= {name.replace(EXPERT, other): x.clone() for name, x in parts.items()}
        message = f"tensor {other}.weight is unknown"
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message):
        GemmaForCausalLM.from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize(("width", "group"), [(128, 128), (192, 64), (96, 32), (48, 16)])
def test_experts_are_rounded_to_8_bits_in_the_largest_groups_that_fit(tmp_path, width, group):
    tiny(width).save_pretrained(tmp_path)
    model = loaded(tmp_path, quantize="int8")
    for layer in model.layers:
        assert layer.experts_down_proj.packing == Packing(8, group, False, torch.float16)
        assert layer.experts_gate_up_proj.packing == Packing(8, 128, False, torch.float16)
        assert not isinstance(layer.router_proj, PackedWeight)


@pytest.mark.parametrize("bits", [4, 8])
def test_each_expert_is_rounded_alone(tmp_path, bits):
    """Rounding all rows at once gives the same values, because groups do not cross rows."""
    hf = tiny(96)
    hf.save_pretrained(tmp_path)
    found = weights(loaded(tmp_path, quantize=f"int{bits}"))
    checkpoint = RoundedCheckpoint(open_checkpoint(tmp_path), bits)
    for i, layer in enumerate(hf.model.layers):
        weight, name = layer.experts.down_proj, f"model.layers.{i}.experts"
        groups = weight.detach().float().flatten(0, 1).unflatten(1, (-1, 32))
        values, scale = round_groups(groups, bits)
        expected = (values.unflatten(1, (-1, 32)) * scale.float().unsqueeze(-1)).view(weight.shape)
        for e, matrix in enumerate(expected):
            assert torch.equal(found[f"{name}.{e}.down_proj.weight"], matrix)
            assert torch.equal(read(checkpoint, f"{name}.{e}.down_proj.weight"), matrix)
        router = f"model.layers.{i}.router.proj.weight"
        assert torch.equal(found[router], layer.router.proj.weight.float())
