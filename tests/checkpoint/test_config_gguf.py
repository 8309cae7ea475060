"""Checks that GGUF metadata are converted to GemmaConfig and to options of generate as llama.cpp
reads them, and that unsupported values are refused."""

import warnings

import gguf
import pytest

from gemma_fast.checkpoint import config_gguf
from gemma_fast.checkpoint.config_gguf import config_from_gguf, generation_from_gguf
from gemma_fast.config import FULL, SLIDING, RopeParameters
from gemma_fast.presets import PRESETS

GGUF_270M = {
    "general.architecture": "gemma3",
    "gemma3.context_length": 32768,
    "gemma3.embedding_length": 640,
    "gemma3.block_count": 18,
    "gemma3.feed_forward_length": 2048,
    "gemma3.attention.head_count": 4,
    "gemma3.attention.head_count_kv": 1,
    "gemma3.attention.key_length": 256,
    "gemma3.attention.layer_norm_rms_epsilon": 9.999999974752427e-07,
    "gemma3.attention.sliding_window": 512,
    "gemma3.rope.freq_base": 1e6,
    "tokenizer.ggml.tokens": ["x"] * 262_144,
    "tokenizer.ggml.eos_token_id": 1,
}


ROPE, SCALED = RopeParameters(1e6), RopeParameters(1e6, "linear", 8.0)
PATTERN = SLIDING, SLIDING, FULL


def test_metadata_of_a_published_file_equal_the_preset():
    assert config_from_gguf(GGUF_270M) == PRESETS["gemma-3-270m"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rope.scaling.type": "none", "rope.scaling.factor": 8.0}, {"full_rope": ROPE}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, {"full_rope": SCALED}),
        ({"rope.scaling.factor": 8.0}, {"full_rope": SCALED}),  # llama.cpp's default is linear
        ({"rope.scale_linear": 8.0}, {"full_rope": SCALED}),  # older name of the factor
        ({"rope.freq_base": None}, {"full_rope": RopeParameters(1e4)}),
        ({"rope.freq_base_swa": 5e4}, {"sliding_rope": RopeParameters(5e4)}),
        ({"block_count": 62}, {"query_pre_attn_scalar": 640 // 4}),
        ({"block_count": 3, "attention.sliding_window_pattern": 3}, {"layer_types": PATTERN}),
        (
            {"block_count": 3, "attention.sliding_window_pattern": [True, True, False]},
            {"layer_types": PATTERN},
        ),
        ({"block_count": 3, "attention.sliding_window": None}, {"layer_types": (FULL,) * 3}),
        ({"block_count": 3, "attention.sliding_window": 0}, {"layer_types": (FULL,) * 3}),
        ({"attn_logit_softcapping": 50.0}, {"attn_logit_softcapping": None}),
        ({"final_logit_softcapping": 30.0}, {"final_logit_softcapping": 30.0}),
        ({"attention.head_count_kv": None}, {"num_key_value_heads": 4}),
        ({"attention.key_length": None}, {"head_dim": 640 // 4}),
        ({"feed_forward_length": [2048] * 18}, {"intermediate_size": 2048}),
    ],
    ids=str,
)
def test_fields_are_read_from_gguf(change, expected):
    config = config_from_gguf(GGUF_270M | {f"gemma3.{k}": v for k, v in change.items()})
    assert {name: getattr(config, name) for name in expected} == expected


def test_token_ids_are_read_from_gguf():
    ids = {"bos": 7, "eos": 8, "padding": 9}
    config = config_from_gguf(
        GGUF_270M | {f"tokenizer.ggml.{k}_token_id": v for k, v in ids.items()}
    )
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (7, 8, 9)


def test_query_pre_attn_scalar_of_27b_models_is_derived_from_gguf():
    metadata = {k.replace("gemma3.", "gemma2."): v for k, v in GGUF_270M.items()}
    metadata |= {"general.architecture": "gemma2", "gemma2.block_count": 46}
    metadata |= {"gemma2.embedding_length": 576, "gemma2.rope.freq_base": 5e4}
    config = config_from_gguf(metadata)
    assert config.query_pre_attn_scalar == 144
    assert config.full_rope == config.sliding_rope == RopeParameters(5e4)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50, 30)
    assert config_from_gguf(metadata | {"gemma2.block_count": 26}).query_pre_attn_scalar == 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "llama"}, "'llama' is not one of"),
        ({"general.architecture": ["gemma3"]}, r"\['gemma3'\] is not one of"),
        ({"gemma3.embedding_length": None}, "no gemma3.embedding_length"),
        ({"gemma3.embedding_length": 1 << 40}, "embedding_length=1099511627776"),
        ({"gemma3.rope.scaling.type": "yarn"}, "yarn"),
        ({"gemma3.attention.causal": False}, "attention.causal=False"),
        ({"gemma3.attention.value_length": 128}, r"value_length=128 must .*key_length=256"),
        ({"gemma3.rope.dimension_count": 128}, "dimension_count=128 must equal"),
        ({"gemma3.rope.scaling.attn_factor": 2.0}, "attn_factor=2.0"),
        ({"gemma3.expert_count": 4}, "expert_count=4"),
        ({"gemma3.feed_forward_length": [2048, 1024]}, "layers of different shapes"),
        ({"gemma3.attention.sliding_window_pattern": [True]}, "layer_types has 1 entries"),
        ({"gemma3.attention.sliding_window_pattern": "6"}, "sliding_window_pattern='6'"),
        ({"general.type": "adapter"}, "'adapter' is not supported"),
        ({"tokenizer.ggml.eos_token_id": "1"}, "eos_token_id='1'"),
        ({"tokenizer.ggml.tokens": None}, "no list tokenizer.ggml.tokens"),
    ],
    ids=str,
)
def test_unsupported_gguf_metadata_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_gguf(GGUF_270M | change)


def test_window_and_scaling_of_gemma2_are_read_as_in_llama_cpp():
    metadata = {k.replace("gemma3.", "gemma2."): v for k, v in GGUF_270M.items()}
    metadata |= {"general.architecture": "gemma2", "gemma2.rope.scaling.factor": 4.0}
    del metadata["gemma2.attention.sliding_window"]
    config = config_from_gguf(metadata)
    assert config.full_rope == config.sliding_rope == RopeParameters(1e6, "linear", 4.0)
    assert config.sliding_window == 4096
    assert config.layer_types == (SLIDING, FULL) * 9


def test_an_unknown_key_of_the_architecture_gives_a_warning():
    with pytest.warns(UserWarning, match=r"gemma3\.attention\.sinks=4 is unknown"):
        config_from_gguf(GGUF_270M | {"gemma3.attention.sinks": 4})


KEYS = [
    key.removeprefix("{arch}.")
    for part in (gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope)
    for key in vars(part).values()
    if isinstance(key, str) and key.startswith("{arch}.")
]


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_applied_or_refused_or_gives_a_warning_or_is_known_to_have_no_effect(key):
    """Adds each key that the package gguf knows, with an odd value."""
    if key in config_gguf.IGNORED:
        return
    changed = GGUF_270M | {f"gemma3.{key}": 3}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if config_from_gguf(changed) != config_from_gguf(GGUF_270M):
                return
        except ValueError:
            return
    assert key == "attn_logit_softcapping" or key in str(caught[-1].message)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"tokenizer.ggml.eos_token_id": 1}, {"eos_token_id": [1]}),
        (
            {"tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.eot_token_id": 106},
            {"eos_token_id": [1, 106]},
        ),
        (
            {"tokenizer.ggml.tokens": ["<pad>", "<eos>", "x", "<end_of_turn>"]},
            {"eos_token_id": [1, 3]},
        ),
        ({"tokenizer.ggml.fim_pad_token_id": 7}, {"eos_token_id": [7]}),
        ({"tokenizer.ggml.tokens": ["<|im_end|>", "</s>", "<eos>"]}, {"eos_token_id": [0, 2]}),
        ({"tokenizer.ggml.suppress_tokens": [5, 6]}, {"suppress_tokens": [5, 6]}),
        (
            {"general.sampling.temp": 0.7, "general.sampling.top_k": 64},
            {"temperature": 0.7, "top_k": 64, "do_sample": True},
        ),
        (
            {"general.sampling.temp": 0.0, "general.sampling.penalty_repeat": 1.0},
            {"temperature": 0.0, "repetition_penalty": 1.0, "do_sample": False},
        ),
        ({"general.sampling.top_k": -1}, {"top_k": 0, "do_sample": True}),
        (
            {"general.sampling.top_p": 0.9},
            {"top_p": 0.9, "do_sample": True},
        ),
    ],
    ids=str,
)
def test_options_of_generate_are_read_from_gguf(metadata, expected):
    found = generation_from_gguf(metadata)
    assert {name: found[name] for name in expected} == expected


def test_end_tokens_outside_the_vocabulary_are_ignored_with_a_warning():
    metadata = {"tokenizer.ggml.tokens": ["<pad>", "<eos>"], "tokenizer.ggml.eot_token_id": 2}
    with pytest.warns(UserWarning, match="eot_token_id=2 is not in the vocabulary"):
        assert generation_from_gguf(metadata) == {"eos_token_id": [1]}


@pytest.mark.parametrize("key", config_gguf.SAMPLING.values())
@pytest.mark.parametrize("value", ["hot", [1.0], True, float("nan")], ids=str)
def test_sampling_settings_that_are_no_numbers_are_refused(key, value):
    with pytest.raises(ValueError, match=rf"general.sampling.{key}=.* must be a number"):
        generation_from_gguf({f"general.sampling.{key}": value})


@pytest.mark.parametrize(
    "setting",
    [
        {"mirostat": 2}, {"xtc_probability": 0.5}, {"sequence": "dkypmxt"},
        {"penalty_repeat": 1.1, "penalty_last_n": 64},
    ],
    ids=str,
)  # fmt: skip
def test_sampling_settings_without_an_effect_give_a_warning(setting):
    with pytest.warns(UserWarning, match=rf"general.sampling.{[*setting][-1]}=.* has no effect"):
        generation_from_gguf({f"general.sampling.{k}": v for k, v in setting.items()})
