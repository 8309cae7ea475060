"""Checks which tensors of a GGUF file stay packed in the model, and that the model's weights are
those that gguf dequantizes."""

import re
import warnings

import numpy as np
import pytest
import torch
from checkpoints import config_json, random_tensors, read, write_gguf
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from gguf_blocks import WIDE, random_blocks, random_bytes, set_factor, write_quantized

from gemma_fast import load
from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.checkpoint.base import EMBEDDING, HEAD, PER_LAYER_EMBEDDING
from gemma_fast.checkpoint.config_json import config_from_json
from gemma_fast.checkpoint.open import open_checkpoint
from gemma_fast.kernels.packed import PackedWeight, Packing
from gemma_fast.reference import Reference

Q4_K_M = {"q_proj": Type.Q4_K, "k_proj": Type.Q4_K, "v_proj": Type.Q6_K}


def weights(model) -> dict[str, torch.Tensor]:
    """Returns the model's weights as float32, by the checkpoint's names."""
    found = {}
    for name, tensors in model.parts.items():
        weight = model
        for part in name.split("."):
            weight = getattr(weight, part)
        if isinstance(weight, PackedWeight):
            weight = weight.weight.unpack(torch.float32)
        shapes = model.config.tensor_shapes()
        rows = weight.split([shapes[tensor][0] for tensor in tensors])
        found |= dict(zip(tensors, rows, strict=True))
    return found


def loaded(path, **options) -> GemmaForCausalLM:
    """Loads a model without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return GemmaForCausalLM.from_pretrained(path, device="cpu", dtype="float32", **options)


def assert_holds(model, matrices) -> None:
    found = weights(model)
    for name, expected in matrices.items():
        assert torch.equal(found[name], expected), name


PACKED = {
    Type.Q4_0: Packing(4, 32, False, torch.float16),
    Type.Q4_1: Packing(4, 32, True, torch.float16),
    Type.Q5_0: Packing(8, 32, False, torch.float16),
    Type.Q5_1: Packing(8, 32, True, torch.float16),
    Type.Q8_0: Packing(8, 32, False, torch.float16),
    Type.Q4_K: Packing(4, 32, True, torch.float32),
    Type.Q5_K: Packing(8, 32, True, torch.float32),
    Type.Q6_K: Packing(8, 16, False, torch.float32),
}


@pytest.mark.parametrize("kind", PACKED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("family", ["gemma", "gemma4"])
def test_all_matrices_of_a_file_stay_packed(tmp_path, monkeypatch, family, kind):
    monkeypatch.setattr(load, "PACKED", 64 * 256)  # the vocabulary is read in four parts
    matrices = write_quantized(tmp_path / "model.gguf", family, default=kind)
    model = loaded(tmp_path / "model.gguf")
    packed = {name: x for name, x in model.named_modules() if isinstance(x, PackedWeight)}
    assert {x.packing for x in packed.values()} == {PACKED[kind]}
    assert packed.keys() == {
        name for name in model.parts if not name.endswith(("norm", "layernorm", "layer_scalar"))
    }
    assert_holds(model, matrices)


def test_in_16_bits_scales_are_fp16_and_norms_have_the_models_dtype(tmp_path):
    path = tmp_path / "model.gguf"
    write_quantized(path, "gemma2", default=Type.Q6_K)
    model = GemmaForCausalLM.from_pretrained(path, dtype="float16", device="cpu")
    assert model.dtype == model.layers[0].input_layernorm.dtype == torch.float16
    assert model.layers[0].down_proj.scale.dtype == torch.float16
    assert model.layers[0].down_proj.packing == Packing(8, 16, False, torch.float16)


def test_norms_are_read_without_their_offset(tmp_path):
    tensors = random_tensors("gemma3", **WIDE)
    write_quantized(tmp_path / "model.gguf")
    norms = {name: tensor for name, tensor in tensors.items() if tensor.dim() == 1}
    found = weights(loaded(tmp_path / "model.gguf"))
    for name, norm in norms.items():
        torch.testing.assert_close(found[name], norm, rtol=0, atol=5e-7)


MIXED = {
    "Q4_K_M": (Q4_K_M, Packing(8, 16, True, torch.float32)),
    "Q4_0, Q4_1": ({"k_proj": Type.Q4_1}, Packing(4, 32, True, torch.float16)),
    "Q4_0, Q4_K": ({"v_proj": Type.Q4_K}, Packing(4, 32, True, torch.float32)),
    "Q4_0, Q8_0": ({"k_proj": Type.Q8_0}, Packing(8, 32, False, torch.float16)),
    "Q4_0, Q8_0, Q5_1": (
        {"k_proj": Type.Q8_0, "v_proj": Type.Q5_1}, Packing(8, 32, True, torch.float16)
    ),
    "Q5_K, Q5_0": (
        {"q_proj": Type.Q5_K, "k_proj": Type.Q5_0, "v_proj": Type.Q5_0},
        Packing(8, 32, True, torch.float32),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mixture", MIXED)
def test_types_that_are_mixed_in_one_matmul_are_packed_exactly(tmp_path, mixture):
    kinds, packing = MIXED[mixture]
    matrices = write_quantized(tmp_path / "model.gguf", kinds=kinds)
    model = loaded(tmp_path / "model.gguf")
    assert model.layers[0].qkv_proj.packing == packing
    assert_holds(model, matrices)


def test_gate_and_up_of_different_types_are_packed_exactly(tmp_path):
    kinds = {"gate_proj": Type.Q6_K, "up_proj": Type.Q4_K}
    matrices = write_quantized(tmp_path / "model.gguf", "gemma2", kinds)
    model = loaded(tmp_path / "model.gguf")
    assert model.layers[1].gate_up_proj.packing == Packing(8, 16, True, torch.float32)
    assert_holds(model, matrices)


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.F32], ids=lambda kind: kind.name)
def test_matrices_that_are_not_quantized_stay_so_without_a_warning(tmp_path, kind):
    path = tmp_path / "model.gguf"
    matrices = write_quantized(path, kinds={"embed_tokens": kind, "o_proj": kind})
    model = loaded(path)
    assert not isinstance(model.embed_tokens, PackedWeight)
    assert not isinstance(model.layers[0].o_proj, PackedWeight)
    assert isinstance(model.layers[0].down_proj, PackedWeight)
    assert_holds(model, matrices)


def test_a_matmul_of_which_a_part_is_not_quantized_is_unpacked_with_a_warning(tmp_path):
    path = tmp_path / "model.gguf"
    kinds = {"1.self_attn.k_proj": Type.F16, "1.mlp.up_proj": Type.BF16}
    matrices = write_quantized(path, kinds=kinds)
    message = (
        rf"{path}: 2 matmuls are unpacked, because only some of their parts can stay packed:"
        r" model\.layers\.1\.self_attn\.[qv]_proj\.weight can, but"
        r" model\.layers\.1\.self_attn\.k_proj\.weight cannot"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        model = GemmaForCausalLM.from_pretrained(path, dtype="float32", device="cpu")
    assert len(caught) == 1
    assert not isinstance(model.layers[1].qkv_proj, PackedWeight)
    assert isinstance(model.layers[0].qkv_proj, PackedWeight)
    assert_holds(model, matrices)


def test_other_types_are_unpacked_with_one_warning_that_says_what_it_costs(tmp_path):
    path = tmp_path / "model.gguf"
    kinds = {"down_proj": Type.MXFP4, "o_proj": Type.TQ2_0, "embed_tokens": Type.Q8_0}
    matrices = write_quantized(path, kinds=kinds)
    unpacked = [name for name in matrices if name.endswith(("down_proj.weight", "o_proj.weight"))]
    assert len(unpacked) == 4
    with pytest.warns(UserWarning, match="do not stay packed") as caught:
        model = GemmaForCausalLM.from_pretrained(path, dtype="float32", device="cpu")
    (message,) = (str(warning.message) for warning in caught)
    gigabytes = 4 * 256 * 256 / 1e9
    sizes = gigabytes * 2, gigabytes * (17 / 32 + 66 / 256) / 2
    assert message.startswith(
        f"{path}: the types of 4 tensors (MXFP4, TQ2_0) do not stay packed. Unpacked to 16 bits,"
        " these tensors take {:.3g} GB instead of {:.3g} GB".format(*sizes)
    )
    assert not isinstance(model.layers[0].down_proj, PackedWeight)
    assert isinstance(model.embed_tokens, PackedWeight)
    assert_holds(model, matrices)
    rounded = loaded(path, quantize="int8")  # without the warning
    assert rounded.layers[0].down_proj.packing.bits == 8


def test_on_request_and_in_the_reference_everything_is_unpacked_without_a_warning(tmp_path):
    path = tmp_path / "model.gguf"
    matrices = write_quantized(path, kinds={"down_proj": Type.MXFP4, "k_proj": Type.F16})
    model = loaded(path, quantize="none")
    assert not any(isinstance(x, PackedWeight) for x in model.modules())
    assert_holds(model, matrices)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reference = Reference.from_pretrained(path)
    for name, expected in matrices.items():
        assert torch.equal(reference.weights[name], expected)


@pytest.mark.parametrize("kind", [Type.Q6_K, Type.Q4_0], ids=lambda kind: kind.name)
def test_a_head_of_its_own_is_packed(tmp_path, kind):
    path, shape = tmp_path / "model.gguf", (199, 256)
    stored = {
        EMBEDDING: (random_blocks(shape, Type.Q4_0, 0.1), Type.Q4_0),
        HEAD: (random_blocks(shape, kind, 0.1, seed=1), kind),
    }
    tensors = random_tensors("gemma3", **WIDE) | {HEAD: torch.zeros(shape)}
    write_gguf(path, tensors=tensors, stored=stored, **WIDE)
    model = loaded(path)
    assert model.lm_head.packing == PACKED[kind]
    assert_holds(model, {name: torch.from_numpy(dequantize(*stored[name])) for name in stored})
    assert model.memory()["lm_head"] == model.lm_head.nbytes

    stored[HEAD] = stored[EMBEDDING]  # equal rows: the embedding is the head
    write_gguf(path, tensors=tensors, stored=stored, **WIDE)
    assert loaded(path).lm_head is None


def test_the_table_of_per_layer_embeddings_is_packed(tmp_path):
    path = tmp_path / "model.gguf"
    matrices = write_quantized(path, "gemma4", {"embed_tokens_per_layer": Type.Q5_K})
    model = loaded(path)
    assert model.embed_tokens_per_layer.packing == PACKED[Type.Q5_K]
    assert model.embed_tokens_per_layer.shape == (199, 4 * 256)
    assert_holds(model, {PER_LAYER_EMBEDDING: matrices[PER_LAYER_EMBEDDING]})


def test_a_packed_model_takes_the_bytes_of_its_packings(tmp_path):
    write_quantized(tmp_path / "model.gguf", default=Type.Q4_0)
    model = loaded(tmp_path / "model.gguf")
    shapes = config_from_json(config_json("gemma3", **WIDE)).tensor_shapes().values()
    matrices = sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)
    vectors = sum(shape[0] for shape in shapes if len(shape) == 1)
    assert model.memory()["weights"] == matrices * (16 + 2) // 32 + 4 * vectors
    assert model.num_parameters() == matrices + vectors


def test_rows_that_are_read_do_not_keep_the_file_open(tmp_path):
    """On rows of one block, a slice of the block would be a view of the mapped file."""
    path = tmp_path / "model.gguf"
    quantized = {"quantize": lambda t: (quantize(t.numpy(), Type.Q8_0), Type.Q8_0)}
    write_gguf(path, hidden_size=32, head_dim=32, **quantized)
    checkpoint = open_checkpoint(path)
    rows = checkpoint.packed_rows(EMBEDDING, 0, 12)
    assert rows.values.is_contiguous()
    before = rows.values.clone()
    rows.values.add_(1)
    assert torch.equal(checkpoint.packed_rows(EMBEDDING, 0, 12).values, before)


@pytest.mark.parametrize("part", ["embed_tokens", "layers.1.self_attn.v_proj"])
@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_K], ids=lambda kind: kind.name)
def test_factors_that_are_not_finite_are_refused_with_file_and_tensor(tmp_path, part, kind):
    path, name = tmp_path / "model.gguf", f"model.{part}.weight"
    shape = random_tensors("gemma3", **WIDE)[name].shape
    blocks = random_blocks(shape, kind, 0.1)
    set_factor(blocks[-1:], kind, 0, np.inf)
    stored = {name: (blocks, kind)}
    if part != "embed_tokens":  # q, k and v are packed together
        for other in (name.replace("v_proj", "q_proj"), name.replace("v_proj", "k_proj")):
            rows = random_tensors("gemma3", **WIDE)[other].shape
            stored[other] = random_blocks(rows, kind, 0.1), kind
    write_gguf(path, stored=stored, **WIDE)
    pattern = rf"^{re.escape(str(path))}: tensor {re.escape(name)}: a scale is (inf|nan), which is"
    with pytest.raises(ValueError, match=pattern):
        loaded(path)


def test_a_scale_that_overflows_fp16_is_refused_only_in_16_bits(tmp_path):
    path, name = tmp_path / "model.gguf", "model.layers.0.mlp.down_proj.weight"
    rows = random_bytes((256, 256), Type.Q6_K, np.random.default_rng(0))
    set_factor(rows, Type.Q6_K, 0, 6e4)
    write_gguf(path, "gemma2", stored={name: (rows, Type.Q6_K)}, **WIDE)
    with pytest.raises(ValueError, match=rf"{name}: a scale of \S+ does not fit float16.*'none'"):
        GemmaForCausalLM.from_pretrained(path, dtype="float16", device="cpu")
    found = weights(loaded(path))[name]
    assert torch.equal(found, torch.from_numpy(dequantize(rows, Type.Q6_K)))


def test_quantized_vectors_are_unpacked(tmp_path):
    path, name = tmp_path / "model.gguf", "model.norm.weight"
    factors = quantize(torch.linspace(0.5, 2, 256).numpy(), Type.Q8_0)
    write_gguf(path, stored={name: (factors, Type.Q8_0)}, **WIDE)
    expected = torch.from_numpy(dequantize(factors, Type.Q8_0)) - 1
    assert torch.equal(read(open_checkpoint(path), name), expected)
    assert torch.equal(loaded(path).norm, expected)
