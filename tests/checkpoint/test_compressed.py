"""Checks checkpoints that the library compressed-tensors has quantized: values against those of the
library, bit for bit, and logits against transformers."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from checkpoints import read, split
from compressed_models import NOT_PACKED, SCHEMES, save_compressed
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, close, random_transformers_model

from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.checkpoint import safetensors
from gemma_fast.checkpoint.open import open_checkpoint
from gemma_fast.kernels.packed import PackedWeight, Packing
from gemma_fast.reference import Reference

IDS = torch.arange(3, 40)[None]
Q, K, UP = (
    f"model.layers.0.{x}.weight" for x in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tiny(name: str = "gemma3-gqa", dtype=torch.bfloat16, **changes) -> transformers.PreTrainedModel:
    """Returns a random model whose rows divide into groups of 128."""
    config = CONFIGS[name]
    if config.hidden_size_per_layer_input:
        changes["hidden_size_per_layer_input"] = 128
    config = replace(config, hidden_size=128, intermediate_size=256, **changes)
    return random_transformers_model(config).to(dtype)


def group(scheme: str, *targets: str) -> dict:
    return {"targets": list(targets or ["Linear"]), **SCHEMES[scheme]}


def opened(path):
    """Opens a checkpoint without its warnings, which have a test of their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return open_checkpoint(path)


def packed(checkpoint, name: str, dtype: torch.dtype) -> torch.Tensor:
    """Returns a weight that was packed as load.py does it in a model of a dtype, in fp32."""
    packing = checkpoint.packing(name)
    if packing.scale == torch.float32 and dtype != torch.float32:
        packing = packing._replace(scale=torch.float16)
    weight = PackedWeight(checkpoint.shapes[name], packing)
    rows = weight.shape[0]
    for start in range(0, rows, 24):
        weight.write(start, checkpoint.packed_rows(name, start, min(start + 24, rows)))
    return weight.weight.unpack(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_equal_the_librarys_bit_for_bit(tmp_path, scheme, dtype, monkeypatch):
    """The library computes in the scale's dtype. Its values with the same scales in fp32 are
    compared, too."""
    monkeypatch.setattr(safetensors, "ELEMENTS", 5000)  # some rows at a time
    narrow, wide = save_compressed(tiny(dtype=dtype), tmp_path, {"group": group(scheme)})
    checkpoint = opened(tmp_path)
    assert len(narrow) == 3 * 7
    for name, expected in narrow.items():
        assert read(checkpoint, name, expected.dtype).equal(expected), name
        assert read(checkpoint, name).equal(wide[name]), name
        if scheme in NOT_PACKED:
            assert checkpoint.packing(name) is None
            continue
        unpacked = packed(checkpoint, name, torch.float32)
        if checkpoint.packing(name).minimum and dtype == torch.float32:
            # scale * value and the minimum are rounded before they are added
            torch.testing.assert_close(unpacked, wide[name], rtol=0, atol=2e-7 * 16)
        else:
            assert unpacked.equal(wide[name]), name
        narrowed = packed(checkpoint, name, torch.bfloat16)
        exact = checkpoint.packing(name).scale != torch.float32
        scale = checkpoint.packed_rows(name, 0, 10**6).scale.float().abs().max()
        step = 0 if exact else 2**-11 * 256 * scale.item()  # of the largest value or zero point
        torch.testing.assert_close(narrowed, wide[name], rtol=0, atol=step)


PACKINGS = {
    "w4a16-g32": Packing(4, 32, False, torch.bfloat16),
    "w4a16-g128-asymmetric": Packing(4, 128, True, torch.float32),
    "w4a16-channel": Packing(4, 256, False, torch.bfloat16),
    "w4a16-g16": Packing(8, 16, False, torch.bfloat16),
    "w8a16-channel-asymmetric": Packing(8, 256, True, torch.float32),
    "w8a16-tensor": Packing(8, 256, False, torch.bfloat16),
    "w8a8": Packing(8, 256, False, torch.bfloat16),
    "w4a8": Packing(4, 32, False, torch.bfloat16),
    "nvfp4a16": Packing(8, 16, False, torch.float32),
    "mxfp4a16": Packing(8, 32, False, torch.bfloat16),
}


@pytest.mark.parametrize("scheme", PACKINGS)
def test_weights_stay_packed_in_as_few_bits_as_hold_them(tmp_path, scheme):
    save_compressed(tiny(num_hidden_layers=1, layer_types=()), tmp_path, {"group": group(scheme)})
    checkpoint = opened(tmp_path)
    assert checkpoint.packing("model.layers.0.mlp.down_proj.weight") == PACKINGS[scheme]
    assert checkpoint.packing(EMBEDDING) is None


@pytest.mark.parametrize(
    "scheme", ["w4a16-g32", "w4a16-g32-asymmetric", "w8a16-channel", "fp8-block"]
)
@pytest.mark.parametrize("name", ["gemma-mqa", "gemma2-gqa", "gemma3-gqa", "gemma4-all"])
@pytest.mark.filterwarnings("ignore:.*do not stay packed", "ignore:.*also quantizes")
def test_logits_equal_transformers(tmp_path, name, scheme):
    save_compressed(tiny(name, torch.float32), tmp_path, {"group": group(scheme)})
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
    )
    expected = hf(IDS).logits
    for quantize in (None, "none"):
        model = GemmaForCausalLM.from_pretrained(
            tmp_path, dtype="float32", device="cpu", quantize=quantize
        )
        packs = quantize is None and scheme not in NOT_PACKED
        assert isinstance(model.layers[0].o_proj, PackedWeight) == packs
        close(model(IDS).logits, expected)
    close(Reference.from_pretrained(tmp_path)(IDS).logits, expected)


@pytest.mark.parametrize("multimodal", [False, True])
def test_files_on_the_hub_are_read(tmp_path, multimodal):
    """The layout of official Gemma 4 files: shards, an output head of its own, embeddings in 16
    bits, and towers, whose quantized tensors are skipped."""
    _, expected = save_compressed(tiny("gemma4-all"), tmp_path, {"group": group("w4a16-g32")})
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[HEAD] = torch.randn_like(tensors[EMBEDDING])
    config = json.loads((tmp_path / "config.json").read_text())
    if multimodal:
        tensors = {
            name.replace("model.", "model.language_model."): x for name, x in tensors.items()
        }
        tower = "model.vision_tower.encoder.layers.0.mlp.up_proj.linear."
        packed_up = {k: x for k, x in tensors.items() if "layers.0.mlp.up_proj" in k}
        tensors |= {tower + k.rpartition(".")[2]: x.clone() for k, x in packed_up.items()}
        quantization = config.pop("quantization_config")
        config = {"model_type": "gemma4", "text_config": config}
        config |= {"quantization_config": quantization, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    split(tmp_path, tensors, shards=3)
    checkpoint = open_checkpoint(tmp_path)
    assert not checkpoint.config.tie_word_embeddings
    assert read(checkpoint, HEAD).equal(tensors[HEAD].float())
    assert checkpoint.packing(HEAD) is checkpoint.packing(EMBEDDING) is None
    kept = {name for name in checkpoint.shapes if checkpoint.packing(name)}
    unused = {name for name in expected if name not in checkpoint.shapes}
    assert kept == expected.keys() - unused
    assert all("layers.3" in name or "layers.4" in name for name in unused)  # shared K and V
    for name in kept:
        assert packed(checkpoint, name, torch.float32).equal(expected[name])


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_embedding_stays_packed(tmp_path, tied):
    """The library saves the head in 16 bits beside it. Without it, the embedding is the head."""
    groups = {"group": group("w8a16-channel", "Embedding")}
    _, expected = save_compressed(tiny(), tmp_path, groups)
    assert list(expected) == [EMBEDDING]
    if tied:
        tensors = load_file(file := tmp_path / "model.safetensors")
        save_file({name: x for name, x in tensors.items() if name != HEAD}, file)
    model = GemmaForCausalLM.from_pretrained(tmp_path, dtype="float32", device="cpu")
    assert (model.lm_head is None) == tied
    assert model.embed_tokens.weight.unpack(torch.float32).equal(expected[EMBEDDING])


def test_a_quantized_head_stays_packed(tmp_path):
    hf = tiny(tie_word_embeddings=False)
    _, expected = save_compressed(hf, tmp_path, {"group": group("w4a16-g32")}, ignore=())
    model = GemmaForCausalLM.from_pretrained(tmp_path, dtype="float32", device="cpu")
    assert model.lm_head.weight.unpack(torch.float32).equal(expected[HEAD])
    assert not isinstance(model.embed_tokens, PackedWeight)


def test_every_weight_has_the_scheme_of_its_group(tmp_path):
    groups = {
        "attention": group("w8a16-g32-asymmetric", "re:.*self_attn.*"),
        "down": group("w4a16-g128", "re:.*down_proj$"),
        "rest": group("fp8-dynamic"),
    }
    _, expected = save_compressed(tiny(), tmp_path, groups)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["format"] == "mixed-precision"
    checkpoint = opened(tmp_path)
    for name, weight in expected.items():
        assert read(checkpoint, name).equal(weight), name
    assert checkpoint.packing(Q) == Packing(8, 32, True, torch.float32)
    assert checkpoint.packing(Q.replace("self_attn.q", "mlp.down")).group == 128
    assert checkpoint.packing(Q.replace("self_attn.q", "mlp.up")) is None


def test_a_projection_in_16_bits_beside_packed_ones_unpacks_them(tmp_path):
    groups = {"group": group("w4a16-g32")}
    _, expected = save_compressed(tiny(), tmp_path, groups, ignore=("lm_head", "re:.*0.*k_proj"))
    assert K not in expected
    with pytest.warns(UserWarning, match=f"_proj.weight can, but {K} cannot"):
        model = GemmaForCausalLM.from_pretrained(tmp_path, dtype="float32", device="cpu")
    assert model.layers[0].qkv_proj[:128].equal(expected[Q])
    assert isinstance(model.layers[1].qkv_proj, PackedWeight)


HOSTILE = ["re:(a+)+$", "re:((a|aa)*)*b", "re:(.*)*(.*)*x", "re:(", "re:" + "(?:" * 999, 7, None]


def test_patterns_of_targets_and_ignore_are_not_evaluated(tmp_path):
    _, expected = save_compressed(tiny(), tmp_path, {"group": group("w4a16-g32")})
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    quantization = config["quantization_config"]
    quantization["ignore"] = HOSTILE * 999
    quantization["config_groups"]["group_0"]["targets"] = HOSTILE * 999
    file.write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path)
    assert packed(checkpoint, Q, torch.float32).equal(expected[Q])


@pytest.mark.parametrize(
    ("scheme", "match"),
    [
        ("w8a8", r"also quantizes activations \(to 8 bits\) while the model runs"),
        ("nvfp4", r"also quantizes activations \(to 4 bits\)"),
        ("mxfp8a16", r"21 weights, for example .*\(mxfp8-quantized\), do not stay packed"),
    ],
)
def test_what_is_lost_is_a_warning(tmp_path, scheme, match):
    save_compressed(tiny(), tmp_path, {"group": group(scheme)})
    with pytest.warns(UserWarning, match=match) as caught:
        GemmaForCausalLM.from_pretrained(tmp_path, device="cpu")
    assert len(caught) == 1


def test_float8_that_is_rounded_to_int8_is_no_warning(tmp_path):
    save_compressed(tiny(), tmp_path, {"group": group("mxfp8a16")})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = GemmaForCausalLM.from_pretrained(tmp_path, device="cpu", quantize="int8")
    assert model.layers[0].qkv_proj.packing.bits == 8


@pytest.mark.parametrize("weights", [False, True])
def test_scales_of_the_kv_cache_are_skipped_with_a_warning(tmp_path, weights):
    save_compressed(tiny(), tmp_path, {"group": group("w4a16-g32")} if weights else {})
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    quantization = config.setdefault("quantization_config", {"quant_method": "compressed-tensors"})
    quantization["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    file.write_text(json.dumps(config))
    scales = {
        f"model.layers.{i}.self_attn.{x}_scale": torch.ones(1) for i in range(3) for x in "kv"
    }
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | scales, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="also quantizes the KV cache while the model runs"):
        checkpoint = open_checkpoint(tmp_path)
    assert not checkpoint.shapes.keys() & scales.keys()
    assert (checkpoint.packing(Q) is not None) == weights
