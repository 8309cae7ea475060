"""Checks that config.json and GGUF metadata are converted to GemmaConfig: all field names and all
defaults. Also checks that unsupported values are refused."""

from dataclasses import replace

import pytest
import transformers

from gemma_fast.checkpoint.config_files import config_from_gguf, config_from_json
from gemma_fast.config import FULL, PRESETS, SLIDING

# These configs equal those on the Hub. A missing field has transformers' default.
GEMMA_3_4B = {
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "vision_config": {"hidden_size": 1152},
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
}
GEMMA_2B = {
    "model_type": "gemma", "vocab_size": 256000, "hidden_size": 2048, "num_hidden_layers": 18,
    "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "hidden_act": "gelu",
    "hidden_activation": None, "intermediate_size": 16384, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
}  # fmt: skip
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


def test_published_configs_equal_the_presets():
    assert config_from_json(GEMMA_2B) == PRESETS["gemma-2b"]
    assert config_from_json(GEMMA_3_4B) == replace(PRESETS["gemma-3-4b"], eos_token_id=(1, 106))
    assert config_from_gguf(GGUF_270M) == PRESETS["gemma-3-270m"]


@pytest.mark.parametrize("name", PRESETS)
def test_fields_of_transformers_4_and_5_give_the_same_config(name):
    """Converts a config that transformers 5 saved. Then converts the same values with the field
    names of transformers 4."""
    config = PRESETS[name]
    classes = {
        "gemma": transformers.GemmaConfig,
        "gemma2": transformers.Gemma2Config,
        "gemma3": transformers.Gemma3TextConfig,
    }
    old = {
        field: getattr(config, field)
        for field in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings",
            "rope_theta",
        )
    }  # fmt: skip
    if config.model_type != "gemma":
        old |= {
            "query_pre_attn_scalar": config.query_pre_attn_scalar,
            "sliding_window": config.sliding_window,
        }
    if config.model_type == "gemma3":
        old |= {"rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
        if config.rope_scaling_factor != 1:
            old["rope_scaling"] = {"rope_type": "linear", "factor": config.rope_scaling_factor}
    saved = classes[config.model_type](**old).to_dict()
    assert "rope_parameters" in saved
    assert "rope_theta" not in saved
    assert config_from_json(saved) == config
    family = config.model_type + ("_text" if config.model_type == "gemma3" else "")
    assert config_from_json({"model_type": family} | old) == config
    if scaling := old.get("rope_scaling"):
        scaling["type"] = scaling.pop("rope_type")
        assert config_from_json({"model_type": family} | old) == config


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text"])
def test_missing_fields_have_transformers_defaults(family):
    saved = transformers.AutoConfig.for_model(family).to_dict()
    assert config_from_json({"model_type": family}) == config_from_json(saved)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"model_type": "gemma", "head_dim": 128}, {"query_pre_attn_scalar": 128}),
        (
            {"model_type": "gemma2", "attn_logit_softcapping": None},
            {"attn_logit_softcapping": None},
        ),
        (
            {"model_type": "gemma2", "rope_theta": 5e4},
            {"rope_theta": 5e4, "rope_local_base_freq": 5e4},
        ),
        (
            {"model_type": "gemma3_text", "num_hidden_layers": 2, "_sliding_window_pattern": 2},
            {"layer_types": (SLIDING, FULL)},
        ),
        (GEMMA_3_4B | {"text_config": {"eos_token_id": 5}}, {"eos_token_id": 5}),
    ],
    ids=str,
)
def test_fields_are_read_from_json(given, expected):
    config = config_from_json(given)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rope.scaling.factor": 8.0}, {"rope_scaling_factor": 1}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 8.0}, {"rope_scaling_factor": 1}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, {"rope_scaling_factor": 8}),
        ({"block_count": 62}, {"query_pre_attn_scalar": 640 / 4}),
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
    assert config.rope_theta == config.rope_local_base_freq == 5e4
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50, 30)
    assert config_from_gguf(metadata | {"gemma2.block_count": 26}).query_pre_attn_scalar == 256


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (field, value)
        for field in (
            "hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "head_dim",
            "num_key_value_heads", "intermediate_size", "max_position_embeddings",
        )
        for value in (-1, 0, 10**12, "8", 2.5, [4], True, float("nan"))
    ]
    + [
        ("rms_norm_eps", float("nan")), ("rms_norm_eps", -1e-6), ("rope_theta", "1e4"),
        ("rope_theta", float("inf")), ("eos_token_id", "x"), ("eos_token_id", [1, -2]),
    ],
)  # fmt: skip
def test_fields_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        config_from_json(GEMMA_2B | {field: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "'llama' is not one of gemma, gemma2, gemma3"),
        ({"model_type": None}, "'None' is not one of"),
        ({"model_type": "gemma3n"}, "gemma3n"),
        ({"num_key_value_heads": 3}, "num_attention_heads=8 is not divisible by"),
        ({"head_dim": 33}, "head_dim=33 is odd"),
        ({"hidden_activation": "silu"}, "silu"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "yarn"),
        ({"rope_scaling": "linear"}, "must be JSON objects"),
        ({"hidden_activation": None, "hidden_act": "silu"}, "silu"),
        (
            {"model_type": "gemma2", "rope_scaling": {"type": "linear", "factor": 2}},
            "'linear' is not supported for gemma2",
        ),
        (
            {"rope_parameters": {FULL: {}, SLIDING: {"rope_type": "yarn"}}},
            "'yarn' on sliding_attention layers",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling_factor=0"),
        ({"text_config": 3}, "text_config"),
        ({"model_type": "gemma2", "layer_types": ["global"] * 18}, "'global'"),
        ({"model_type": "gemma2", "layer_types": [FULL]}, "layer_types has 1 entries"),
        ({"model_type": "gemma2", "layer_types": 3}, "layer_types=3"),
        ({"model_type": "gemma2", "sliding_window": -4}, "sliding_window=-4"),
        ({"model_type": "gemma2", "attn_logit_softcapping": 0}, "attn_logit_softcapping=0"),
    ],
    ids=str,
)
def test_unsupported_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_json(GEMMA_2B | change)


def test_unsupported_fields_outside_text_config_are_refused():
    with pytest.raises(ValueError, match="tie_word_embeddings=False"):
        config_from_json(GEMMA_3_4B | {"tie_word_embeddings": False})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "llama"}, "'llama' is not one of"),
        ({"general.architecture": ["gemma3"]}, r"\['gemma3'\] is not one of"),
        ({"gemma3.embedding_length": None}, "no gemma3.embedding_length"),
        ({"gemma3.embedding_length": 1 << 40}, "hidden_size=1099511627776"),
        ({"gemma3.rope.scaling.type": "yarn"}, "yarn"),
        pytest.param(
            {k.replace("gemma3.", "gemma2."): v for k, v in GGUF_270M.items()}
            | {"general.architecture": "gemma2", "gemma2.rope.scaling.type": "linear"},
            "gemma2.rope.scaling.type 'linear'",
            id="linear scaling of gemma2",
        ),
        ({"tokenizer.ggml.tokens": None}, "vocab_size=None"),
    ],
    ids=str,
)
def test_unsupported_gguf_metadata_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_gguf(GGUF_270M | change)
