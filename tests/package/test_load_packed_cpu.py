"""Tests in which dtype a model with packed weights computes on a CPU, that its logits are those of
unpacked weights, and the warning on a machine without a compiler."""

from dataclasses import replace

import pytest
import torch
from c_kernels import needs_c, without_c
from compressed_models import SCHEMES, save_compressed
from gguf_blocks import write_quantized
from packed_checkpoints import PackedCheckpoint
from tiny_models import CONFIGS, random_transformers_model

from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.checkpoint.random import RandomCheckpoint
from gemma_fast.kernels.packed import PackedWeight
from gemma_fast.model import packing
from gemma_fast.reference import Reference

SIZES = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128}


def tiny(name: str = "gemma3-gqa", *, quantize: str | None = "int8", dtype="auto"):
    changes = dict(SIZES)
    if name == "gemma4-all":
        changes |= {"vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 32}
    return GemmaForCausalLM.from_checkpoint(
        RandomCheckpoint(replace(CONFIGS[name], **changes)),
        dtype=dtype, device="cpu", quantize=quantize,
    )  # fmt: skip


def packed_weights(model) -> dict[str, PackedWeight]:
    return {name: x for name, x in model.named_modules() if isinstance(x, PackedWeight)}


@pytest.fixture(params=["avx512_bf16", "amx_bf16", "bf16", ""])
def instructions(request, monkeypatch) -> str:
    """The CPU's instructions for bf16 matmuls on x86 and Arm; "": it has none."""
    names = ("avx512_bf16", "amx_bf16", "bf16")
    found = {name: name == request.param for name in names}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    return request.param


@needs_c
def test_packed_weights_are_computed_in_bf16_where_the_cpu_has_it(instructions):
    assert tiny().dtype == (torch.bfloat16 if instructions else torch.float32)
    for quantize in ("none", None):  # not packed
        model = tiny(quantize=quantize)
        assert model.dtype == torch.float32 and not packed_weights(model)


def test_without_c_kernels_packed_weights_are_computed_in_float32(instructions):
    with without_c():
        assert tiny().dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_packed_weights_do_not_depend_on_the_dtype(dtype):
    found, expected = (packed_weights(tiny("gemma-mha", dtype=x)) for x in (dtype, "float32"))
    assert {"embed_tokens", "lm_head", "layers.0.gate_up_proj"} <= found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.equal(weight.data, expected[name].data)
        scale = expected[name].scale
        assert torch.equal(weight.scale, scale if dtype == "float32" else scale.half())


def test_without_a_compiler_one_warning_says_what_to_do(monkeypatch):
    with without_c():
        model = tiny()  # too small for a warning
        size = sum(x.numel() for x in packed_weights(model).values())
        monkeypatch.setattr(packing, "SLOW", size)
        message = r"without the kernels .* quantize='none' is faster, but needs 0.0 GB"
        with pytest.warns(UserWarning, match=message) as found:
            tiny()
    assert len(found) == 1


@needs_c
def test_with_a_compiler_there_is_no_warning(monkeypatch, recwarn):
    monkeypatch.setattr(packing, "SLOW", 1)
    tiny()
    assert not recwarn.list


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("name", ["gemma-mha", "gemma2-gqa", "gemma3-gqa", "gemma4-all"])
def test_bf16_logits_are_those_of_unpacked_weights(name, quantize):
    """Compares with a model in float32 that has the packed model's weights, unpacked."""
    model = tiny(name, quantize=quantize, dtype="bfloat16")
    ids, packed = torch.randint(2, 256, (2, 12)), packed_weights(model)
    expected = tiny(name, quantize=None, dtype="float32")
    unpacked = {
        name: packed[name].weight.unpack(torch.float32)
        if name in packed
        else model.get_parameter(name).float()
        for name in expected.parts
    }
    expected.load_state_dict(unpacked)
    exact = expected(ids).logits
    in_bf16 = expected.bfloat16()(ids).logits.float()
    limit = 2 * (in_bf16 - exact).abs().mean()
    assert (model(ids).logits - exact).abs().mean() <= limit
    cache = model(ids[:, :-1]).past_key_values
    step = model(ids[:, -1:], past_key_values=cache).logits
    assert (step[:, -1] - exact[:, -1]).abs().mean() <= 2 * limit
    assert limit < 0.1 * exact.std()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", [None, "w4a16-g32-asymmetric"])
def test_packed_files_are_read_whatever_the_default_device_is(tmp_path, scheme, dtype):
    path, ids = tmp_path, torch.tensor([[2, 5, 9]])
    if scheme is None:
        path = tmp_path / "model.gguf"
        write_quantized(path)
    else:
        hf = random_transformers_model(replace(CONFIGS["gemma3-gqa"], **SIZES))
        save_compressed(hf, path, {"group": {"targets": ["Linear"], **SCHEMES[scheme]}})
    expected = GemmaForCausalLM.from_pretrained(path, dtype=dtype, device="cpu")(ids).logits
    with torch.device("meta"):
        model = GemmaForCausalLM.from_pretrained(path, dtype=dtype, device="cpu")
    assert torch.equal(model(ids).logits, expected)


def test_a_converted_model_computes_with_the_same_weights():
    model, ids = tiny(dtype="bfloat16"), torch.randint(2, 256, (1, 12))
    before = model(ids).logits
    kept = {name: weight.data.clone() for name, weight in packed_weights(model).items()}
    after = model.float()(ids).logits
    assert all(torch.equal(x.data, kept[name]) for name, x in packed_weights(model).items())
    assert after.dtype == torch.float32
    assert (after - before).abs().mean() < 0.1 * after.std()


def test_a_packed_model_can_move_to_another_device():
    model = tiny("gemma4-all", dtype="bfloat16").to("meta")
    assert {x.device.type for x in (*model.parameters(), *packed_weights(model).values())} == {
        "meta"
    }


def mixture(*packed: str, dtype="bfloat16") -> tuple[GemmaForCausalLM, Reference]:
    """Returns a model of which only the weights with these words in their names are packed."""
    config = replace(CONFIGS["gemma-mha"], **SIZES)

    class Checkpoint(PackedCheckpoint):
        def packing(self, name):
            return super().packing(name) if any(word in name for word in packed) else None

    checkpoint = Checkpoint(config, "int8-g32-minimum")
    model = GemmaForCausalLM.from_checkpoint(checkpoint, dtype=dtype, device="cpu")
    return model, Reference.from_checkpoint(checkpoint, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("packed", ["lm_head", "embed_tokens"])
def test_only_the_head_or_only_the_embedding_is_packed(packed, dtype):
    model, reference = mixture(packed, dtype=dtype)
    assert packed_weights(model).keys() == {packed}
    ids = torch.randint(2, 256, (2, 12))
    exact, found = reference(ids).logits, model(ids).logits
    error = (found - exact).norm() / exact.norm()
    assert error < (2e-2 if dtype == "bfloat16" else 1e-5)
    steps = model.generate(ids, max_new_tokens=3, eos_token_id=[])
    assert steps.shape == (2, 15)
