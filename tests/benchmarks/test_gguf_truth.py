"""Tests that GGUF metadata and tensors are read by llama.cpp's rules.

The expected values are those of llama.cpp's source: src/llama-model.cpp and src/models/gemma*.cpp.
"""

import gguf
import pytest
import tiny_gemma4
import torch
from checkpoints import FAMILIES
from tiny_tokenizer import TEXTS, gguf_metadata, tiny_backend
from verified_files import GEMMA_4_KEYS, KEYS, write_gguf_file

from gemma_fast.benchmarks.verify.gguf_truth import FULL, SLIDING, GGUFTruth, config_of, parts
from gemma_fast.benchmarks.verify.llama_cpp_ids import llama_cpp_ids
from gemma_fast.text.tokenizer import Tokenizer

LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}


def config(family, **keys):
    own = GEMMA_4_KEYS if family == "gemma4" else KEYS
    given = own | {name.replace("__", "."): value for name, value in keys.items()}
    metadata = {f"{family}.{name}": value for name, value in given.items() if value is not None}
    metadata["general.architecture"] = family
    return config_of(metadata, vocab_size=9, tie_word_embeddings=True)


def test_gemma_3_without_a_window_is_full_on_all_layers():
    for keys in ({}, {"attention__sliding_window": 0}):
        found = config("gemma3", rope__freq_base=1e6, **keys)
        assert found.layer_types == [FULL] * 7
        assert found.rope_parameters[FULL] == {"rope_type": "default", "rope_theta": 1e6}


@pytest.mark.parametrize(
    ("pattern", "windows"),
    [(None, "1111101"), (3, "1101101"), (0, "1111111"), ([True, False] * 3 + [True], "1010101")],
    ids=str,
)
def test_pattern_of_layers_is_a_period_or_a_list(pattern, windows):
    keys = {"attention__sliding_window": 8, "attention__sliding_window_pattern": pattern}
    expected = [SLIDING if x == "1" else FULL for x in windows]
    assert config("gemma3", **keys).layer_types == expected
    if pattern is not None:
        assert config("gemma2", **keys).layer_types == expected


def test_default_values_are_llama_cpps():
    gemma2 = config("gemma2")
    assert gemma2.sliding_window == 4096 and gemma2.layer_types[:3] == [SLIDING, FULL, SLIDING]
    assert (gemma2.attn_logit_softcapping, gemma2.final_logit_softcapping) == (50, 30)
    gemma3 = config("gemma3", attention__sliding_window=8)
    assert gemma3.rope_parameters[FULL]["rope_theta"] == 1e4, "not 1e6"
    assert gemma3.rope_parameters[SLIDING] == {"rope_type": "default", "rope_theta": 1e4}
    assert gemma3.final_logit_softcapping is None
    found = config("gemma", attention__head_count_kv=None, attention__key_length=None)
    assert (found.num_key_value_heads, found.head_dim) == (2, 32)


def test_values_that_llama_cpp_reads_are_read():
    found = config(
        "gemma3", attention__sliding_window=8, rope__freq_base_swa=5e3, rope__scaling__factor=8.0,
        final_logit_softcapping=7.0,
    )  # fmt: skip
    assert found.rope_parameters[SLIDING]["rope_theta"] == 5e3
    assert found.rope_parameters[FULL] == LINEAR, "without a type, the factor is linear"
    assert found.final_logit_softcapping == 7
    for family in ("gemma", "gemma2"):
        assert config(family, rope__scaling__factor=8.0).rope_parameters == LINEAR


def test_values_that_llama_cpp_ignores_are_ignored():
    ignored = {"attention__scale": 0.5, "rope__scaling__alpha": 2.0}
    found = config("gemma3", attn_logit_softcapping=3.0, **ignored)
    assert found.attn_logit_softcapping is None and found.query_pre_attn_scalar == 32
    found = config("gemma3", rope__scaling__type="none", rope__scaling__factor=8.0)
    assert found.rope_parameters[FULL]["rope_type"] == "default"


@pytest.mark.parametrize(("family", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_largest_models_scale_queries_by_hidden_over_heads(family, layers):
    keys = {"embedding_length": 168, "attention__head_count": 4}
    assert config(family, block_count=layers, **keys).query_pre_attn_scalar == 42
    assert config(family, block_count=layers - 1, **keys).query_pre_attn_scalar == 32


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"attention__value_length": 16}, "attention.value_length 16"),
        ({"rope__dimension_count": 16}, "rope.dimension_count 16"),
        ({"attention__causal": False}, "attention.causal False"),
        ({"expert_count": 8}, "expert_count 8"),
        ({"attention__head_count": [2, 4]}, "the same attention.head_count"),
        ({"rope__scaling__type": "yarn"}, "rope.scaling.type 'yarn'"),
    ],
)
def test_models_that_transformers_does_not_have_are_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        config("gemma3", **keys)


def test_layers_of_gemma_4_have_the_shapes_in_the_metadata():
    found = config("gemma4", rope__freq_base_swa=None)
    assert found.layer_types == [SLIDING, FULL, SLIDING, FULL]
    shapes = [
        (x.head_dim, x.num_key_value_heads)
        for x in map(found.per_layer_config.__getitem__, range(4))
    ]
    assert shapes == [(32, 2), (64, 1)] * 2
    assert (found.intermediate_size, found.use_double_wide_mlp) == (96, True)
    assert (found.num_kv_shared_layers, found.hidden_size_per_layer_input) == (2, 32)
    assert found.final_logit_softcapping == 30 and found.rope_parameters[SLIDING] == {
        "rope_type": "default", "rope_theta": 1e4
    }  # fmt: skip
    assert config("gemma4", final_logit_softcapping=0.0).final_logit_softcapping is None
    assert not config("gemma4", feed_forward_length=96).use_double_wide_mlp
    scaled = config("gemma4", rope__scaling__factor=8.0).rope_parameters[FULL]
    assert scaled == LINEAR | {
        "rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 1.0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"attention__sliding_window_pattern": [True, False, False, True]}, "layers of the types"),
        ({"attention__sliding_window_pattern": [False, True, True, False]}, "layers of the types"),
        ({"attention__sliding_window_pattern": [True, False]}, "2 values for 4 layers"),
        ({"feed_forward_length": [96, 96, 192, 96]}, "feed_forward_length"),
        ({"attention__value_length_swa": 16}, "attention.value_length_swa 16"),
        ({"rope__dimension_count": 16}, "rope.dimension_count 16"),
        ({"rope__scaling__type": "yarn"}, "rope.scaling.type 'yarn'"),
    ],
)
def test_gemma_4s_that_transformers_does_not_have_are_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        config("gemma4", **keys)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"rope_freqs.weight": None}, "no tensor rope_freqs.weight"),
        ({"rope_freqs.weight": torch.full((32,), 2.0)}, "no rope_freqs.weight"),
        ({"rope_freqs.weight": torch.ones(16)}, "no rope_freqs.weight"),
        ({"blk.0.attn_v.weight": None}, "no tensor blk.0.attn_v.weight"),
        ({"blk.1.attn_k.bias": torch.ones(64)}, "no tensor blk.1.attn_k.bias"),
    ],
)
def test_tensors_of_gemma_4_that_transformers_does_not_have_are_refused(tensors, said, tmp_path):
    path = write_gguf_file(tmp_path / "x.gguf", "gemma4", tensors)
    with pytest.raises(ValueError, match=said):
        GGUFTruth(path).model(torch.float32, "cpu")


def test_tensors_of_gemma_4_are_used_as_stored(tmp_path):
    """Norms lose no 1, keys are values where there is no attn_v, a layer without a scalar is
    multiplied by 1, and keys and values of layers that read an earlier layer's are not used."""
    tensors = {"blk.2.layer_output_scale.weight": None, "blk.3.attn_k.weight": torch.ones(1, 64)}
    path = write_gguf_file(tmp_path / "x.gguf", "gemma4", tensors)
    model, file = GGUFTruth(path).model(torch.float32, "cpu"), gguf.GGUFReader(path)
    stored = {tensor.name: torch.tensor(tensor.data) for tensor in file.tensors}
    layers, close = model.model.layers, torch.testing.assert_close
    close(layers[1].input_layernorm.weight, stored["blk.1.attn_norm.weight"])
    close(layers[1].layer_scalar, stored["blk.1.layer_output_scale.weight"])
    assert layers[2].layer_scalar == 1 and model.config.attention_k_eq_v
    assert model.config.rope_parameters[FULL]["partial_rotary_factor"] * 64 // 2 == 8


@pytest.mark.parametrize("experts", ["stacked", "separate"])
def test_experts_of_gemma_4_are_used_as_stored(experts, tmp_path):
    """gate comes before up, in one tensor and in two. A missing scale of the experts is 1."""
    path = tmp_path / "x.gguf"
    write_gguf_file(path, "gemma4", {"blk.2.ffn_down_exps.scale": None}, experts)
    model, file = GGUFTruth(path).model(torch.float32, "cpu"), gguf.GGUFReader(path)
    stored = {tensor.name: torch.tensor(tensor.data) for tensor in file.tensors}
    config, layer, close = model.config, model.model.layers[1], torch.testing.assert_close
    assert (config.num_experts, config.top_k_experts, config.moe_intermediate_size) == (4, 2, 32)
    gate, up = layer.experts.gate_up_proj.chunk(2, dim=1)
    if experts == "stacked":
        close(layer.experts.gate_up_proj, stored["blk.1.ffn_gate_up_exps.weight"])
    else:
        close(gate.contiguous(), stored["blk.1.ffn_gate_exps.weight"])
        close(up.contiguous(), stored["blk.1.ffn_up_exps.weight"])
    close(layer.experts.down_proj, stored["blk.1.ffn_down_exps.weight"])
    close(layer.router.proj.weight, stored["blk.1.ffn_gate_inp.weight"])
    close(layer.router.scale, stored["blk.1.ffn_gate_inp.scale"])
    close(layer.router.per_expert_scale, stored["blk.1.ffn_down_exps.scale"])
    close(layer.post_feedforward_layernorm_2.weight, stored["blk.1.post_ffw_norm_2.weight"])
    assert (model.model.layers[2].router.per_expert_scale == 1).all()
    for name in ("ffn_gate_inp.scale", "ffn_down_exps.weight", "pre_ffw_norm_2.weight"):
        write_gguf_file(path, "gemma4", {f"blk.1.{name}": None}, experts)
        with pytest.raises(ValueError, match=f"no tensor blk.1.{name}"):
            GGUFTruth(path).model(torch.float32, "cpu")


def test_output_head_of_a_file_is_used(tmp_path):
    rows = len(gguf_metadata("gemma3")["tokenizer.ggml.tokens"])
    head = torch.randn(rows, 64)
    path = write_gguf_file(tmp_path / "x.gguf", "gemma3", {"output.weight": head})
    model = GGUFTruth(path).model(torch.float32, "cpu")
    assert torch.equal(model.lm_head.weight, head)
    assert not torch.equal(model.get_input_embeddings().weight, head)


def test_unknown_and_missing_tensors_are_refused(tmp_path):
    path = write_gguf_file(tmp_path / "x.gguf", "gemma3", {"blk.0.attn_q.bias": torch.ones(64)})
    with pytest.raises(ValueError, match=r"no tensor blk\.0\.attn_q\.bias"):
        GGUFTruth(path).model(torch.float32, "cpu")
    file = GGUFTruth(path)
    del file.tensors["blk.0.attn_q.bias"], file.tensors["output_norm.weight"]
    with pytest.raises(ValueError, match=r"no tensor output_norm\.weight"):
        file.model(torch.float32, "cpu")


def test_quantized_weights_are_dequantized_and_norms_lose_their_one(tmp_path):
    path = write_gguf_file(tmp_path / "x.gguf", "gemma2")
    model, file = GGUFTruth(path).model(torch.float32, "cpu"), gguf.GGUFReader(path)
    stored = {tensor.name: torch.tensor(tensor.data) for tensor in file.tensors}
    layer = model.model.layers[3]
    close = torch.testing.assert_close
    close(layer.post_feedforward_layernorm.weight, stored["blk.3.post_ffw_norm.weight"] - 1)
    close(layer.mlp.down_proj.weight, stored["blk.3.ffn_down.weight"])


def test_parts_of_a_split_file_are_found(tmp_path):
    first = tmp_path / "gemma-00001-of-00003.gguf"
    assert [x.name for x in parts(first)] == [f"gemma-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert parts(tmp_path / "gemma.gguf") == [tmp_path / "gemma.gguf"]


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_by_llama_cpps_rules_are_those_of_the_converted_tokenizer(family):
    metadata = gguf_metadata(family) | {"tokenizer.ggml.bos_token_id": 2}
    metadata["tokenizer.ggml.add_space_prefix"] = False
    converted = Tokenizer(tiny_backend(family), "tokenizer.json", model_type=family)
    for name, text in TEXTS.items():
        assert llama_cpp_ids(metadata, text) == converted(text)["input_ids"], name
    metadata |= {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_space_prefix": True}
    assert llama_cpp_ids(metadata, "hello") == converted(" hello")["input_ids"][1:]


def test_ids_of_gemma_4_by_llama_cpps_rules_are_those_of_the_converted_tokenizer():
    """Merges have a stored order and do not cross the border of a run of newlines. <bos> is always
    added."""
    metadata = tiny_gemma4.gguf_metadata() | {"tokenizer.ggml.bos_token_id": 2}
    converted = Tokenizer(tiny_gemma4.tiny_backend(bos=True), "tokenizer.json")
    texts = TEXTS | {
        "turns": "<|turn>user\nhello</s><turn|>\n", "newlines": "\n\n\n\n\n\n  \n\na\n",
        "spaces before merges": "    the the   the", "accents twice": "ééé\nééé",
    }  # fmt: skip
    for name, text in texts.items():
        expected = converted(text)["input_ids"]
        for flag in (True, False):
            metadata["tokenizer.ggml.add_bos_token"] = flag
            assert llama_cpp_ids(metadata, text) == expected, name
