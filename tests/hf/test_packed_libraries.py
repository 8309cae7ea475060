"""Checks models that compressed-tensors and torchao themselves have quantized: those that the
kernels read, and those that stay as they are."""

import copy

import pytest
import torch
import transformers
from c_kernels import without_c
from hf_models import logits, prompt
from quantized_linears import linears, tiny_model
from tiny_models import close

from gemma_fast.hf import accelerate, explain, restore
from gemma_fast.hf.layers import FastLinear

PACKED = [
    "w4a16-g32", "w4a16-g128", "w4a16-channel", "w4a16-g32-asymmetric", "w4a16-g128-asymmetric",
    "w4a16-channel-asymmetric", "w4a16-g16", "w8a16-g32", "w8a16-channel", "w8a16-g32-asymmetric",
    "w8a16-channel-asymmetric",
]  # fmt: skip
LEFT = {
    "w8a16-tensor": "scales of shape (1,) do not fit", "w8a8": "its activations are quantized",
    "w4a8": "its activations are quantized", "int8-naive": "its format is naive-quantized",
    "fp8-dynamic": "its activations are quantized", "fp8-block": "its activations are quantized",
    "nvfp4a16": "its format is nvfp4-pack-quantized", "mxfp4a16": "its format is mxfp4",
}  # fmt: skip


def compressed(scheme, path, ignore=("lm_head",), dtype=torch.float32, tied=True):
    """Returns the compressed model, which is also saved at path, and one with the weights that the
    library unpacks."""
    pytest.importorskip("compressed_tensors")
    from compressed_models import SCHEMES, save_compressed

    model, plain = (tiny_model(hidden=128, dtype=dtype, tied=tied) for _ in range(2))
    unpacked, _ = save_compressed(
        model, path, {"group_0": {"targets": ["Linear"], **copy.deepcopy(SCHEMES[scheme])}}, ignore
    )
    assert not plain.load_state_dict(unpacked, strict=False).unexpected_keys
    return model, plain


def lines_of(model):
    return [line for line in explain(model) if line.part == "linear"]


@pytest.mark.parametrize("scheme", PACKED)
def test_weights_of_compressed_tensors_give_the_same_logits(scheme, tmp_path):
    (model, plain), ids = compressed(scheme, tmp_path), prompt()
    before = {n: x.clone() for n, x in model.state_dict().items()}
    expected = logits(plain, ids)
    accelerate(model, linear=True, strict=True)
    close(logits(model, ids), expected)
    assert {x.path for x in lines_of(model)} == {"reference"}
    for state in (model.state_dict(), restore(model).state_dict()):
        assert list(state) == list(before)
        assert all(torch.equal(x, before[n]) for n, x in state.items())
    close(logits(model, ids), expected)  # the library unpacks the weights
    assert type(linears(model)["model.layers.0.mlp.up_proj"]) is torch.nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a16-channel"])
def test_loaded_checkpoint_of_compressed_tensors_stays_packed(scheme, dtype, tmp_path):
    (_, plain), ids = compressed(scheme, tmp_path, dtype=dtype), prompt()
    exact = logits(copy.deepcopy(plain).float(), ids)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, attn_implementation="eager"
    )
    accelerate(model, linear=True, strict=True)
    found = logits(model, ids)
    assert all(isinstance(x, FastLinear) for x in linears(model).values())
    if dtype == torch.float32:
        close(found, exact)
    else:
        theirs = (logits(plain, ids) - exact).square().mean().sqrt()
        assert (found - exact).square().mean().sqrt() < 1.2 * theirs
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", dtype=dtype, attn_implementation="eager"
    )
    assert torch.equal(logits(accelerate(again, linear=True, strict=True), ids), found)


def test_quantized_head_is_packed_too(tmp_path):
    (model, plain), ids = compressed("w4a16-g32", tmp_path, ignore=(), tied=False), prompt()
    expected = logits(plain, ids)
    close(logits(accelerate(model, linear=True, strict=True), ids), expected)
    assert isinstance(model.lm_head, FastLinear)
    close(logits(restore(model), ids), expected)


@pytest.mark.parametrize("scheme", LEFT)
def test_other_schemes_of_compressed_tensors_stay(scheme, tmp_path):
    dtype = torch.bfloat16 if "fp4" in scheme else torch.float32  # fp4 is unpacked to bf16
    (model, _), ids = compressed(scheme, tmp_path, dtype=dtype), prompt()
    theirs, _ = compressed(scheme, tmp_path, dtype=dtype)
    with pytest.raises(RuntimeError, match="strict=True requires"):
        accelerate(model, linear=True, strict=True)
    accelerate(model, linear=True)
    expected = logits(theirs, ids)
    lines = lines_of(model)
    assert len(lines) == len(linears(model)) and {x.path for x in lines} == {"transformers"}
    assert all(LEFT[scheme] in line.why for line in lines), lines[0].why
    with without_c():  # another order of sums changes which 8 bits activations are rounded to
        found = logits(model, ids)
    if dtype == torch.float32:
        close(found, expected)
    else:
        assert (found - expected).abs().max() < 0.1


@pytest.mark.parametrize("first", ["called", "accelerated"])
def test_unpacked_model_of_compressed_tensors_is_accelerated_and_restored(first, tmp_path):
    """Unpacking replaces the forward of all modules that have parameters."""
    (model, plain), ids = compressed("w4a16-g32", tmp_path), prompt()
    expected = logits(plain, ids)
    acts = lambda m: logits(m, ids), lambda m: accelerate(m, linear=False)
    for act in acts if first == "called" else acts[::-1]:
        act(model)
    close(logits(model, ids), expected)
    ours = {line.part for line in explain(model) if line.path == "reference"}
    assert ours == {"norm", "mlp", "attention"}
    why = "compressed-tensors has unpacked its weight: load the model again"
    assert all(line.why.startswith(why) for line in lines_of(model))
    close(logits(restore(model), ids), expected)


def torchao_configs():
    from torchao import quantization as ao

    return {
        "int8": ao.Int8WeightOnlyConfig(),
        "int8, groups": ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(32)),
        "int4, groups": ao.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=ao.PerGroup(32)
        ),
        "int4, zero points": ao.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=ao.PerGroup(32),
            mapping_type=ao.MappingType.ASYMMETRIC,
        ),
        "int8 activations": ao.Int8DynamicActivationInt8WeightConfig(),
        "one scale": ao.Int8WeightOnlyConfig(granularity=ao.PerTensor()),
        "float8": ao.Float8WeightOnlyConfig(),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["int8", "int8, groups", "int4, groups", "int4, zero points"])
def test_weights_of_torchao_give_the_same_logits(name):
    model, ids = _quantized_by_torchao(name), prompt()
    expected = logits(model, ids)
    accelerate(model, linear=True, strict=True)
    close(logits(model, ids), expected)
    assert {x.path for x in lines_of(model)} == {"reference"}
    other = copy.deepcopy(model)
    close(logits(other, ids), expected)
    exact = (logits(other.bfloat16(), ids) - expected).abs().max()
    assert exact < 0.1 and {x.path for x in lines_of(other)} == {"reference"}
    assert torch.equal(logits(restore(model), ids), expected)


REASONS = {
    "int8 activations": "its activations are scaled or quantized",
    "one scale": "scales of shape (1, 1) do not fit", "float8": "its weight is a Float8Tensor",
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_other_weights_of_torchao_stay(name):
    model, ids = _quantized_by_torchao(name), prompt()
    expected = logits(model, ids)
    close(logits(accelerate(model, linear=True), ids), expected)
    assert {x.path for x in lines_of(model)} == {"transformers"}
    assert all(REASONS[name] in line.why for line in lines_of(model))


def _quantized_by_torchao(name):
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny_model(hidden=128)
    names = set(linears(model))
    quantization.quantize_(model, torchao_configs()[name], filter_fn=lambda _, name: name in names)
    return model
