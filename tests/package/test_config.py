"""Tests GemmaConfig: sizes and layer types of the published models, and refused values."""

from dataclasses import replace

import pytest

from gemma_fast.config import FULL, SLIDING, GemmaConfig
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
}


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
