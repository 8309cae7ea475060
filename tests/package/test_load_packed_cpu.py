"""Tests which dtype and layout packed weights get on a CPU, and that the model computes with them
what it computes with unpacked ones."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from compressed_models import SCHEMES, save_compressed
from gguf_blocks import write_quantized
from packed_checkpoints import PackedCheckpoint
from tiny_models import CONFIGS, random_transformers_model
from triton_interpreter import interpreter

from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.checkpoint.random import RandomCheckpoint
from gemma_fast.kernels import packed_cpu
from gemma_fast.kernels._int4pack import block_rows
from gemma_fast.kernels.packed import PackedWeight
from gemma_fast.kernels.packed_cpu import CPUPackedWeight
from gemma_fast.model import packing
from gemma_fast.reference import Reference

needs_kernel = pytest.mark.skipif(block_rows() is None, reason="needs AVX2 or AVX512")
SIZES = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128}  # in whole blocks


def tiny(name: str = "gemma3-gqa", *, quantize: str | None = "int8", dtype="auto", **changes):
    if name == "gemma4-all":
        changes |= {"vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 32}
    config = replace(CONFIGS[name], **SIZES | changes)
    return GemmaForCausalLM.from_checkpoint(
        RandomCheckpoint(config), dtype=dtype, device="cpu", quantize=quantize
    )


def layouts(model) -> dict[str, type]:
    return {name: type(x) for name, x in model.named_modules() if isinstance(x, PackedWeight)}


@needs_kernel
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_packed_weights_are_computed_in_bf16_on_the_kernel(dtype):
    block_rows.cache_clear()
    model = tiny(dtype=dtype)
    assert model.dtype == torch.bfloat16
    found = layouts(model)
    assert "embed_tokens" in found and "layers.0.gate_up_proj" in found
    assert set(found.values()) == {CPUPackedWeight}


@needs_kernel
@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("name", ["gemma-mha", "gemma2-gqa", "gemma3-gqa", "gemma4-all"])
def test_logits_are_those_of_unpacked_weights(name, quantize):
    """Compares with a model in float32 that has the packed model's weights, unpacked."""
    model, ids = tiny(name, quantize=quantize), torch.randint(2, 256, (2, 12))
    expected = tiny(name, quantize=None, dtype="float32")
    unpacked = {
        name: x.weight.unpack(torch.float32) if isinstance(x, PackedWeight) else x.float()
        for name in expected.parts
        for x in [
            model.get_submodule(name) if name in layouts(model) else model.get_parameter(name)
        ]
    }
    expected.load_state_dict(unpacked)
    exact = expected(ids).logits
    in_bf16 = expected.bfloat16()(ids).logits.float()
    limit = 2 * (in_bf16 - exact).abs().mean()
    whole = model(ids)
    assert (whole.logits - exact).abs().mean() <= limit
    cache = model(ids[:, :-1]).past_key_values
    step = model(ids[:, -1:], past_key_values=cache).logits
    assert (step[:, -1] - exact[:, -1]).abs().mean() <= 2 * limit
    assert limit < 0.1 * exact.std()


@needs_kernel
def test_tables_that_are_only_read_by_row_keep_their_rows_together():
    found = layouts(tiny("gemma-mha"))
    assert (found["embed_tokens"], found["lm_head"]) == (PackedWeight, CPUPackedWeight)
    assert layouts(tiny("gemma4-all"))["embed_tokens_per_layer"] is PackedWeight


@needs_kernel
def test_weights_that_are_not_whole_blocks_have_the_plain_layout():
    found = layouts(tiny(vocab_size=200, intermediate_size=80))
    assert found["embed_tokens"] is PackedWeight
    assert found["layers.0.gate_up_proj"] is PackedWeight  # 80 rows and 80
    assert found["layers.0.o_proj"] is CPUPackedWeight


@needs_kernel
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtypes_have_the_plain_layout(dtype):
    assert set(layouts(tiny("gemma-mha", dtype=dtype)).values()) == {PackedWeight}


@needs_kernel
def test_weights_that_are_not_packed_keep_their_dtype():
    assert tiny(quantize="none").dtype == tiny(quantize=None).dtype == torch.float32
    assert not layouts(tiny(quantize="none"))


def test_interpreted_kernels_have_the_plain_layout():
    with interpreter():
        model = tiny()
    assert (model.dtype, *set(layouts(model).values())) == (torch.float32, PackedWeight)


def test_without_kernels_packed_weights_are_float32_with_one_warning(monkeypatch):
    monkeypatch.setattr(packed_cpu, "block_rows", lambda: None)
    model = tiny()  # too small for a warning
    assert (model.dtype, *set(layouts(model).values())) == (torch.float32, PackedWeight)
    size = sum(x.numel() for x in model.modules() if isinstance(x, PackedWeight))
    monkeypatch.setattr(packing, "SLOW", size)
    message = r"packed weights in float32 .* quantize='none' is faster, but needs 0.0 GB"
    with pytest.warns(UserWarning, match=message) as found:
        tiny()
    assert len(found) == 1


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


@needs_kernel
def test_a_converted_model_computes_with_the_same_weights():
    model, ids = tiny(), torch.randint(2, 256, (1, 12))
    before = model(ids).logits
    converted = model.float()
    assert set(layouts(converted).values()) == {CPUPackedWeight}
    after = converted(ids).logits
    assert after.dtype == torch.float32
    assert (after - before).abs().mean() < 0.1 * after.std()


@needs_kernel
def test_a_move_to_a_gpu_is_refused_before_anything_moves():
    model, ids, moved = tiny("gemma4-all"), torch.randint(2, 256, (1, 12)), []

    def to_gpu(x):
        moved.append(x.numel())
        return SimpleNamespace(is_cuda=True)

    before = model(ids).logits
    with pytest.raises(ValueError, match="load the model again with device='cuda'"):
        model._apply(to_gpu)
    assert moved == [0]
    assert torch.equal(model(ids).logits, before)


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
    assert layouts(model).keys() == {packed}
    ids = torch.randint(2, 256, (2, 12))
    exact, found = reference(ids).logits, model(ids).logits
    error = (found - exact).norm() / exact.norm()
    assert error < (2e-2 if dtype == "bfloat16" else 1e-5)
    steps = model.generate(ids, max_new_tokens=3, eos_token_id=[])
    assert steps.shape == (2, 15)
