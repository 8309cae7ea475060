"""Checks that bad checkpoints of compressed-tensors, and those of other libraries, are refused with
an error that names file, tensor and value."""

import json
import warnings
from dataclasses import replace
from functools import cache

import pytest
import torch
from checkpoints import config_json, random_tensors, write_safetensors
from compressed_models import SCHEMES, save_compressed
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, random_transformers_model

from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.checkpoint.open import open_checkpoint

X = "model.layers.0.mlp.up_proj"  # [96, 96] in this model
INF, NAN = float("inf"), float("nan")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns a function from a scheme to the tensors and the config of a model."""

    @cache
    def save(scheme: str):
        path = tmp_path_factory.mktemp(scheme)
        group = {"targets": ["Linear"], **SCHEMES[scheme]}
        hf = random_transformers_model(
            replace(CONFIGS["gemma3-gqa"], hidden_size=96, intermediate_size=96)
        ).to(torch.bfloat16)
        save_compressed(hf, path, {"group": group})
        return load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())

    return save


def write(path, tensors, config) -> None:
    save_file(
        {k: x.contiguous() for k, x in tensors.items() if x is not None}, path / "model.safetensors"
    )
    (path / "config.json").write_text(json.dumps(config))


SYMMETRIC, ASYMMETRIC, INT8, FP8, NVFP4 = (
    "w4a16-g32", "w4a16-g32-asymmetric", "w8a8", "fp8-dynamic", "nvfp4a16"
)  # fmt: skip
BAD_TENSORS = {
    "values-missing": (SYMMETRIC, "packed", lambda x: None, "weight_packed is missing, but pack-q"),
    "scale-missing": (SYMMETRIC, "scale", lambda x: None, "weight_scale is missing"),
    "shape-missing": (SYMMETRIC, "shape", lambda x: None, "weight_shape is missing"),
    "zero-point-missing": (ASYMMETRIC, "zero_point", lambda x: None, "zero_point is missing"),
    "global-scale-missing": (NVFP4, "global_scale", lambda x: None, "global_scale is missing"),
    "int8-scale-missing": (INT8, "scale", lambda x: None, "weight_scale is missing"),
    "zero-point-added": (SYMMETRIC, "zero_point", lambda x: torch.ones(12, 3), "not part of sym"),
    "g_idx": (SYMMETRIC, "g_idx", lambda x: torch.arange(96).int(), "weight_g_idx gives the order"),
    "values-int64": (SYMMETRIC, "packed", lambda x: x.long(), r"dtype I64 and shape \(96, 12\)"),
    "values-uint8": (SYMMETRIC, "packed", lambda x: x.view(torch.uint8), "has dtype U8"),
    "values-short": (SYMMETRIC, "packed", lambda x: x[:-1], r"shape \(95, 12\), but .* \(96, 12\)"),
    "values-narrow": (SYMMETRIC, "packed", lambda x: x[:, 1:], r"dtype I32 and shape \(96, 11\)"),
    "values-transposed": (SYMMETRIC, "packed", lambda x: x.T, r"shape \(12, 96\)"),
    "values-flat": (SYMMETRIC, "packed", lambda x: x.flatten(), r"shape \(1152,\)"),
    "values-3d": (SYMMETRIC, "packed", lambda x: x[None], r"shape \(1, 96, 12\)"),
    "scale-dtype": (SYMMETRIC, "scale", lambda x: x.double(), "weight_scale has dtype F64"),
    "scale-int": (SYMMETRIC, "scale", lambda x: x.int(), "weight_scale has dtype I32"),
    "scale-of-one-group": (SYMMETRIC, "scale", lambda x: x[:, :1], r"\(96, 1\), but .* \(96, 3\)"),
    "scale-transposed": (SYMMETRIC, "scale", lambda x: x.T, r"weight_scale has .* shape \(3, 96\)"),
    "scale-flat": (INT8, "scale", lambda x: x[:, 0], r"weight_scale has .* shape \(96,\)"),
    "scale-fp8": (NVFP4, "scale", lambda x: x.bfloat16(), "weight_scale has dtype BF16"),
    "shape-other": (SYMMETRIC, "shape", lambda x: x + 1, r"has dtype I32 and shape|do not divide"),
    "shape-huge": (SYMMETRIC, "shape", lambda x: x + 2**60, "requires|do not divide"),
    "shape-negative": (SYMMETRIC, "shape", lambda x: -x, r"matrix of shape \(-96, -96\)"),
    "shape-3d": (SYMMETRIC, "shape", lambda x: torch.ones(3).long(), r"weight_shape has .* \(3,\)"),
    "shape-float": (SYMMETRIC, "shape", lambda x: x.float(), "weight_shape has dtype F32"),
    "zero-point-int8": (ASYMMETRIC, "zero_point", lambda x: x.to(torch.int8), "has dtype I8"),
    "zero-point-shape": (ASYMMETRIC, "zero_point", lambda x: x[1:], r"zero_point has .* \(11, 3\)"),
    "global-scale-shape": (NVFP4, "global_scale", lambda x: x.repeat(2), r"shape \(2,\)"),
    "fp8-e5m2": (FP8, "", lambda x: x.float().to(torch.float8_e5m2), "has dtype F8_E5M2"),
    "not-quantized": (INT8, "", lambda x: x.bfloat16(), r"\.weight has dtype BF16"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_must_fit_the_scheme(tmp_path, saved, case):
    scheme, suffix, change, match = BAD_TENSORS[case]
    tensors, config = saved(scheme)
    name = f"{X}.weight{'_' * bool(suffix)}{suffix}"
    write(tmp_path, tensors | {name: change(tensors.get(name))}, config)
    with pytest.raises(ValueError, match=rf"model\.safetensors: tensor {X}.*{match}"):
        open_checkpoint(tmp_path)


BAD_VALUES = {
    "nan": (SYMMETRIC, "scale", NAN, "weight_scale is not finite"),
    "inf": (INT8, "scale", -INF, "weight_scale is not finite"),
    "fp8": (FP8, "scale", NAN, "weight_scale is not finite"),
    "global-0": (NVFP4, "global_scale", 0.0, "weight_scale is not finite"),
    "e8m0": ("mxfp4a16", "scale", 255, "weight_scale is not finite"),
    "4-bit-values": ("w4a8", "", 8, r"has values outside -8 … 7"),
    "4-bit-zero-points": ("w4a8-asymmetric", "zero_point", -9, r"zero_point has values outside -8"),
}


@pytest.mark.parametrize("quantize", [None, "none"])
@pytest.mark.parametrize("case", BAD_VALUES)
@pytest.mark.filterwarnings("ignore:.*do not stay packed", "ignore:.*also quantizes")
def test_values_must_be_valid(tmp_path, saved, case, quantize):
    scheme, suffix, value, match = BAD_VALUES[case]
    tensors, config = saved(scheme)
    name = f"{X}.weight{'_' * bool(suffix)}{suffix}"
    changed = tensors[name].clone()
    changed[-1] = torch.tensor(value).to(changed.dtype)
    write(tmp_path, tensors | {name: changed}, config)
    with pytest.raises(ValueError, match=rf"model\.safetensors: tensor {X}.*{match}"):
        GemmaForCausalLM.from_pretrained(tmp_path, device="cpu", quantize=quantize)


WEIGHTS = {"num_bits": 4, "group_size": 32, "strategy": "group"}
BAD_CONFIGS = {
    "list": ([], "quantization_config=.* must be a JSON object"),
    "no-method": ({"quant_method": None}, "quant_method None is not supported"),
    "groups": ({"config_groups": [1]}, r"config_groups=\[1\] must be a JSON object"),
    "many-groups": ({"config_groups": dict.fromkeys(map(str, range(65)))}, "at most 64 groups"),
    "group": ({"config_groups": {"g": None}}, r"config_groups\.g=None must be a JSON object"),
    "preset": ({"config_groups": {"W4A16": ["Linear"]}}, r"W4A16=\['Linear'\].*write the scheme"),
    "sparsity": ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config=.*24"),
    "transform": ({"transform_config": {"config_groups": {"u": 1}}}, "transform_config=.*not supp"),
    "2-bits": (WEIGHTS | {"num_bits": 2}, "'num_bits': 2.*gemma_fast.hf"),
    "huge-bits": (WEIGHTS | {"num_bits": 10**50}, "format='pack-quantized' is not supported"),
    "float-bits": (WEIGHTS | {"num_bits": 4.0}, "format='pack-quantized' is not supported"),
    "type": (WEIGHTS | {"type": "float"}, "format='pack-quantized' is not supported"),
    "format": ({"format": "marlin-24"}, "format='marlin-24' is not supported"),
    "strategy": (WEIGHTS | {"strategy": "head"}, "strategy='head' is not supported"),
    "group-0": (WEIGHTS | {"group_size": 0}, "strategy='group' is not supported"),
    "group-none": (WEIGHTS | {"group_size": None}, "strategy='group' is not supported"),
    "group-text": (WEIGHTS | {"group_size": "32"}, "strategy='group' is not supported"),
    "group-36": (WEIGHTS | {"group_size": 36}, "has 96 columns, which groups of 36 do not divide"),
    "group-24": (WEIGHTS | {"group_size": 24}, r"shape \(\d+, 3\), but .* requires .* \(\d+, 4\)"),
    "group-huge": (WEIGHTS | {"group_size": 10**50}, r"requires .* \(\d+, 1\)"),
    "block": (WEIGHTS | {"strategy": "block", "block_structure": [0, 4]}, "strategy='block' is"),
    "dynamic": (WEIGHTS | {"dynamic": True}, "dynamic=True is not supported"),
    "actorder": (WEIGHTS | {"actorder": "group"}, "actorder='group' is not supported"),
    "symmetric": (WEIGHTS | {"symmetric": "yes"}, "symmetric='yes' is not supported"),
    "8-bits": (WEIGHTS | {"num_bits": 8}, r"weight_packed has .* requires I32 and \(\d+, 24\)"),
    "asymmetric": (WEIGHTS | {"symmetric": False}, "weight_zero_point is missing"),
    "unknown-field": (WEIGHTS | {"rotation": 3}, "the field 'rotation' is unknown"),
    "no-groups": ({"config_groups": {}}, "a quantized weight, but config.json describes"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_config_must_be_supported(tmp_path, saved, case):
    change, match = BAD_CONFIGS[case]
    tensors, config = saved(SYMMETRIC)
    config = json.loads(json.dumps(config))
    if "num_bits" in change:
        config["quantization_config"]["config_groups"]["group_0"]["weights"] = change
    elif "format" in change:
        config["quantization_config"]["config_groups"]["group_0"] |= change
    else:
        config["quantization_config"] = config["quantization_config"] | change if change else change
    write(tmp_path, tensors, config)
    with pytest.raises(ValueError, match=match) as error:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_groups_that_a_weight_fits_in_two_ways_are_refused(tmp_path, saved):
    tensors, config = saved(FP8)
    config = json.loads(json.dumps(config))
    groups = config["quantization_config"]["config_groups"]
    for rows in (64, 80):  # 96 rows are 2 blocks of 64, and 2 of 80
        block = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [rows, 96]}
        groups[str(rows)] = groups["group_0"] | {"weights": block}
    write(tmp_path, tensors | {f"{X}.weight_scale": torch.ones(2, 1)}, config)
    with pytest.raises(
        ValueError, match=rf"{X}.* fits several config groups, with blocks \(64, 96"
    ):
        open_checkpoint(tmp_path)


def test_an_unknown_key_of_the_quantization_is_a_warning(tmp_path, saved):
    tensors, config = saved(SYMMETRIC)
    quantization = config["quantization_config"] | {"speed": 3}
    write(tmp_path, tensors, config | {"quantization_config": quantization})
    with pytest.warns(UserWarning, match=r"quantization_config\.speed is unknown"):
        open_checkpoint(tmp_path)


HF = r"gemma_fast\.hf\.accelerate"
METHODS = {
    "bitsandbytes": HF, "torchao": HF, "gptq": HF, "awq": HF, "fp8": HF, "hqq": HF,
    "modelopt": r"\.gguf file of the model, or vLLM", "gemma": "qat-q4_0-gguf",
}  # fmt: skip


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_other_methods_are_refused_with_a_way_out(tmp_path, method, nested):
    write_safetensors(tmp_path)
    config, quantization = config_json("gemma3"), {"quantization_config": {"quant_method": method}}
    if nested:
        config = {"model_type": "gemma3", "text_config": config | quantization}
    else:
        config |= quantization
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=f"config.json: .*'{method}' is not supported.*{METHODS[method]}"
    ):
        open_checkpoint(tmp_path)


def test_two_different_quantization_configs_are_refused(tmp_path, saved):
    tensors, config = saved(SYMMETRIC)
    both = {"model_type": "gemma3", "text_config": config}
    write(tmp_path, tensors, both | {"quantization_config": config["quantization_config"]})
    open_checkpoint(tmp_path)
    write(tmp_path, tensors, both | {"quantization_config": {"quant_method": "awq"}})
    with pytest.raises(ValueError, match=r"config\.json: quantization_config differs from that in"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("suffix", "match"),
    [
        ("weight.absmax", "of bitsandbytes.*accelerate"),
        ("weight.nested_absmax", "of bitsandbytes"),
        ("weight.quant_state.bitsandbytes__nf4", "of bitsandbytes"),
        ("SCB", "of bitsandbytes"),
        ("_weight_qdata", "of torchao.*accelerate"),
        ("qweight", "of gptq or awq.*accelerate"),
        ("weight_scale_2", "of modelopt.*vLLM"),
        ("weight_scale_inv", "of fp8.*accelerate"),
        ("input_activation_scale", "of gemma.*qat-q4_0-gguf"),
        ("weight_packed", "belongs to a quantized weight, but config.json describes none"),
        ("weight_scale", "belongs to a quantized weight"),
    ],
)
def test_quantized_tensors_without_a_config_are_refused(tmp_path, suffix, match):
    name = f"model.layers.1.mlp.up_proj.{suffix}"
    write_safetensors(tmp_path, tensors=random_tensors("gemma3") | {name: torch.ones(3)})
    with pytest.raises(ValueError, match=rf"model\.safetensors: tensor {name} {match}"):
        open_checkpoint(tmp_path)


def test_modelopts_older_config_is_refused(tmp_path):
    write_safetensors(tmp_path)
    (tmp_path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"hf_quant_config\.json: quantization by modelopt is not"):
        open_checkpoint(tmp_path)


def test_unchanged_files_open(tmp_path, saved):
    """The other tests change these files."""
    for scheme in {bad[0] for bad in (*BAD_TENSORS.values(), *BAD_VALUES.values())}:
        write(tmp_path, *saved(scheme))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            open_checkpoint(tmp_path)
