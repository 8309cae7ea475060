"""Tests GemmaConfig: sizes and layer types of the published models, and refused values."""

from dataclasses import replace

import pytest

from gemma_fast.config import FULL, SLIDING, GemmaConfig, LayerShape, RopeParameters
from gemma_fast.presets import PRESETS

PARAMETERS = {
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,
    "gemma-3-12b": 11_766_034_176,
    "gemma-3-27b": 27_009_346_304,
    "gemma-4-e2b": 4_628_569_379,
    "gemma-4-e4b": 7_463_013_418,
    "gemma-4-12b": 11_907_350_320,
    "gemma-4-26b-a4b": 25_233_141_790,
    "gemma-4-31b": 30_697_345_340,
}

EXPERTS = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 8}


@pytest.mark.parametrize("name", PARAMETERS)
def test_presets_have_the_published_size(name):
    assert PRESETS[name].num_parameters == PARAMETERS[name]


@pytest.mark.parametrize("name", ["gemma-2-27b", "gemma-3-27b"])
def test_attention_scale_of_27b_models_is_not_the_head_dim(name):
    config = PRESETS[name]
    assert config.query_pre_attn_scalar == config.hidden_size / config.num_attention_heads
    assert config.query_pre_attn_scalar != config.head_dim


def test_layer_types_and_windows_are_the_published_ones():
    assert PRESETS["gemma-2b"].layer_types == (FULL,) * 18
    assert PRESETS["gemma-2-2b"].layer_types[:4] == (SLIDING, FULL, SLIDING, FULL)
    assert PRESETS["gemma-3-1b"].layer_types[:7] == (SLIDING,) * 5 + (FULL, SLIDING)
    assert PRESETS["gemma-3-1b"].window(0) == 512
    assert PRESETS["gemma-3-1b"].window(5) is None


def test_missing_window_and_unknown_model_type_are_refused():
    config = PRESETS["gemma-3-1b"]
    with pytest.raises(ValueError, match="sliding_window is not set"):
        replace(config, sliding_window=None)
    with pytest.raises(ValueError, match="model_type 'bert'"):
        GemmaConfig(**{**vars(config), "model_type": "bert"})


def test_layers_of_gemma_4_have_the_published_shapes():
    layers = PRESETS["gemma-4-e2b"].layers
    assert layers[13] == LayerShape(SLIDING, 512, 256, 1, 6144, 13, False)
    assert layers[14] == LayerShape(FULL, None, 512, 1, 6144, 14, False)
    assert {x[:5] for x in layers[15:] if x.kv_layer == 13} == {(SLIDING, 512, 256, 1, 12288)}
    assert {x[:5] for x in layers[15:] if x.kv_layer == 14} == {(FULL, None, 512, 1, 12288)}
    assert [x.kv_layer for x in layers[:15]] == list(range(15))
    layers = PRESETS["gemma-4-12b"].layers
    assert layers[4] == LayerShape(SLIDING, 1024, 256, 8, 15360, 4, False)
    assert layers[5] == LayerShape(FULL, None, 512, 1, 15360, 5, True)
    assert PRESETS["gemma-4-31b"].layers[59].num_key_value_heads == 4


def test_norms_and_scale_depend_on_the_family():
    before, config = PRESETS["gemma-3-1b"], PRESETS["gemma-4-e2b"]
    assert (before.norm_offset, before.qk_norm, before.v_norm) == (1.0, True, False)
    assert (config.norm_offset, config.qk_norm, config.v_norm) == (0.0, True, True)
    assert config.post_norms and config.query_pre_attn_scalar == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_shared_layers": 31}, "leaves no layer of type full_attention"),
        ({"num_kv_shared_layers": 35}, "leaves no layer of type"),
        ({"num_kv_shared_layers": 600}, "num_kv_shared_layers=600 must be an integer from 0"),
        ({"global_head_dim": 511}, "global_head_dim=511 is odd"),
        ({"global_head_dim": 4096}, "global_head_dim=4096 must be"),
        ({"num_global_key_value_heads": 3}, "not divisible by num_global_key_value_heads=3"),
        ({"hidden_size_per_layer_input": 1 << 14}, "hidden_size_per_layer_input=16384 must be"),
        ({"vocab_size_per_layer_input": 1000}, "vocab_size_per_layer_input=1000 is below vocab"),
        ({"num_experts": 4}, "a mixture of experts needs"),
        ({**EXPERTS, "top_k_experts": 0}, "from 1 to num_experts experts"),
        ({**EXPERTS, "top_k_experts": 5}, "num_experts=4 with top_k_experts=5"),
        ({**EXPERTS, "moe_intermediate_size": 0}, "moe_intermediate_size=0: a mixture"),
        ({"num_experts": 1 << 20}, "num_experts=1048576 must be an integer from 0 to 1024"),
        ({"num_experts": None}, "num_experts=None must be"),
        ({"attention_k_eq_v": None}, "attention_k_eq_v=None must be a bool"),
        ({"use_double_wide_mlp": 1}, "use_double_wide_mlp=1 must be a bool"),
        ({"full_rope": RopeParameters(1e6, "llama3")}, "full_rope: rope_type='llama3'"),
        (
            {"full_rope": RopeParameters(1e6, "proportional", partial_rotary_factor=1.5)},
            "full_rope: partial_rotary_factor=1.5 must be",
        ),
    ],
    ids=str,
)
def test_bad_shapes_of_gemma_4_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(PRESETS["gemma-4-e2b"], **change)


def test_only_gemma_4_has_experts():
    assert replace(PRESETS["gemma-4-e2b"], **EXPERTS).num_experts == 4
    with pytest.raises(ValueError, match="a mixture of experts needs model_type gemma4"):
        replace(PRESETS["gemma-3-1b"], **EXPERTS)
