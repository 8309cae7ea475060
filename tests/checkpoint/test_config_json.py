"""Checks that config.json and GGUF metadata are converted to GemmaConfig: all field names and all
defaults. Also checks that unsupported values are refused."""

from dataclasses import replace

import pytest
import transformers

from gemma_fast.checkpoint.config_json import config_from_json
from gemma_fast.config import FULL, SLIDING, RopeParameters
from gemma_fast.presets import PRESETS

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


def test_published_configs_equal_the_presets():
    assert config_from_json(GEMMA_2B) == PRESETS["gemma-2b"]
    assert config_from_json(GEMMA_3_4B) == replace(PRESETS["gemma-3-4b"], eos_token_id=(1, 106))


@pytest.mark.parametrize("name", [x for x in PRESETS if PRESETS[x].model_type != "gemma4"])
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
        )
    }  # fmt: skip
    old["rope_theta"] = config.full_rope.rope_theta
    if config.model_type != "gemma":
        old |= {
            "query_pre_attn_scalar": config.query_pre_attn_scalar,
            "sliding_window": config.sliding_window,
        }
    if config.model_type == "gemma3":
        old |= {"rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
        if config.full_rope.rope_type == "linear":
            old["rope_scaling"] = {"rope_type": "linear", "factor": config.full_rope.factor}
    saved = classes[config.model_type](**old).to_dict()
    assert "rope_parameters" in saved
    assert "rope_theta" not in saved
    assert config_from_json(saved) == config
    family = config.model_type + ("_text" if config.model_type == "gemma3" else "")
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
            {"full_rope": RopeParameters(5e4), "sliding_rope": RopeParameters(5e4)},
        ),
        (
            {"model_type": "gemma3_text", "num_hidden_layers": 2, "sliding_window_pattern": 2},
            {"layer_types": (SLIDING, FULL)},
        ),
        (GEMMA_3_4B | {"text_config": {"eos_token_id": 5}}, {"eos_token_id": (1, 106)}),
        (
            {"model_type": "gemma3", "text_config": {"eos_token_id": 5, "pad_token_id": None}},
            {"eos_token_id": 5, "pad_token_id": 5},
        ),
    ],
    ids=str,
)
def test_fields_are_read_from_json(given, expected):
    config = config_from_json(given)
    assert {name: getattr(config, name) for name in expected} == expected


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
        ("rope_theta", float("inf")), ("eos_token_id", "x"), ("eos_token_id", [1, "2"]),
        ("pad_token_id", [0]),
    ],
)  # fmt: skip
def test_fields_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        config_from_json(GEMMA_2B | {field: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "'llama' is not one of gemma, gemma2, gemma3"),
        ({"model_type": None}, "None is not one of"),
        ({"model_type": "gemma3"}, "text_config=None must be a JSON object"),
        ({"model_type": "gemma3n"}, "gemma3n"),
        ({"num_key_value_heads": 3}, "num_attention_heads=8 is not divisible by"),
        ({"head_dim": 33}, "head_dim=33 is odd"),
        ({"model_type": "gemma2", "hidden_activation": "silu"}, "hidden_activation='silu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings=0 must be a bool"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config=.*fp8"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4}}, "longrope"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs a factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "factor='4'"),
        (
            {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 0}},
            "original_max_position_embeddings=0",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' must be a JSON object"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_type"),
        ({"hidden_activation": None, "hidden_act": "silu"}, "silu"),
        ({"rope_parameters": {FULL: {}, SLIDING: {}}}, "one object for all layers"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor=0"),
        ({"model_type": "gemma3", "text_config": 3}, "text_config=3"),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma2"}},
            "'gemma2' is not gemma3_text",
        ),
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


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("eos_token_id", -1, ()),
        ("eos_token_id", [1, -2, 10**6], (1,)),
        ("pad_token_id", -1, 1),  # the first end token
        ("bos_token_id", -1, 2),
    ],
)
def test_token_ids_outside_the_vocabulary_are_ignored_with_a_warning(field, value, expected):
    with pytest.warns(UserWarning, match=f"here: {field}=.* is not in the vocabulary"):
        config = config_from_json(GEMMA_2B | {field: value}, "here")
    assert getattr(config, field) == expected


def test_messages_do_not_repeat_long_values():
    for field in ("vocab_size", "model_type", "layer_types"):
        with pytest.raises(ValueError, match=field) as error:
            config_from_json(GEMMA_2B | {"model_type": "gemma2"} | {field: "A" * 10**6})
        assert len(str(error.value)) < 300


def test_final_soft_cap_of_a_multimodal_model_is_refused():
    """transformers' multimodal model ignores it, but its text model applies it."""
    text = GEMMA_3_4B["text_config"] | {"final_logit_softcapping": 30.0}
    with pytest.raises(ValueError, match=r"text_config\.final_logit_softcapping is not supported"):
        config_from_json(GEMMA_3_4B | {"text_config": text})


def test_fields_outside_text_config_come_first():
    assert not config_from_json(GEMMA_3_4B | {"tie_word_embeddings": False}).tie_word_embeddings
    with pytest.raises(ValueError, match="quantization_config"):
        config_from_json(GEMMA_3_4B | {"quantization_config": {"quant_method": "gptq"}})
