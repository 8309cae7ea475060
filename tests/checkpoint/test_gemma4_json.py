"""Checks how config.json of a Gemma 4 is read: both spellings of the layers' shapes, the defaults
of both text classes, multimodal files, and what is refused.

transformers' config of the same fields is the truth: it must be read alike after transformers has
saved it, and its model must have the tensors that GemmaConfig requires.
"""

import pytest
import torch
import transformers

from gemma_fast.checkpoint.config_json import config_from_json
from gemma_fast.checkpoint.experts import stored_shapes
from gemma_fast.config import FULL, SLIDING, GemmaConfig
from gemma_fast.presets import PRESETS

KINDS = ("gemma4", "gemma4_unified")
TEXT = {
    "vocab_size": 99, "hidden_size": 24, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 20, "sliding_window": 6,
    "layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL], "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": 99,
}  # fmt: skip
SHARED = {"num_kv_shared_layers": 2, "use_double_wide_mlp": True}
KEYS_ARE_VALUES = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
EXPERTS = {
    "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 7,
}  # fmt: skip
CHANGES = [
    {},
    {"global_head_dim": 16},
    {"global_head_dim": 8},
    {"num_global_key_value_heads": 1},  # without an effect: K and V have projections of their own
    {"attention_k_eq_v": True},
    KEYS_ARE_VALUES,
    KEYS_ARE_VALUES | {"num_global_key_value_heads": 2},
    SHARED,
    SHARED | {"use_double_wide_mlp": False},
    SHARED | KEYS_ARE_VALUES | {"global_head_dim": 16},
    {"use_double_wide_mlp": True},  # without an effect: no layer shares keys and values
    {"hidden_size_per_layer_input": 0},
    {"vocab_size_per_layer_input": 120},
    {"layer_types": None, "num_hidden_layers": 6},
    {"layer_types": [FULL] * 5},
    {"per_layer_config": {}},
    {"per_layer_config": {}, "global_head_dim": 16, **KEYS_ARE_VALUES},
    {"per_layer_config": {"2": {"head_dim": 16}, "04": {"head_dim": 16}}},
    {"per_layer_config": {"2": {"num_key_value_heads": 1}, "4": {"num_key_value_heads": 1}}},
    {"per_layer_config": {str(i): {"head_dim": 16, "sliding_window": 6} for i in (0, 1, 3)}},
    {"per_layer_config": {str(i): {"head_dim": 4} for i in range(5)}},
]


def transformers_class(kind: str, name: str):
    return getattr(transformers, kind.replace("gemma4", "Gemma4").replace("_u", "U") + name)


def tensors(kind: str, config: transformers.PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Returns name → shape of parameters and layer scalars of transformers' model."""
    with torch.device("meta"):
        model = transformers_class(kind, "ForCausalLM")(config)
    scalars = {name: x for name, x in model.named_buffers() if name.endswith("layer_scalar")}
    return {name: tuple(x.shape) for name, x in (dict(model.named_parameters()) | scalars).items()}


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_those_of_transformers(kind, change):
    given = {"model_type": f"{kind}_text"} | TEXT | change
    config = config_from_json(given)
    theirs = transformers_class(kind, "TextConfig").from_dict(given)
    assert config.tensor_shapes() == tensors(kind, theirs)
    assert config_from_json(theirs.to_dict()) == config
    windows = {SLIDING: TEXT["sliding_window"], FULL: None}
    assert [layer.window for layer in config.layers] == [windows[x] for x in theirs.layer_types]


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].model_type == "gemma4"])
def test_presets_are_read_from_the_fields_on_the_hub_and_have_transformers_tensors(name):
    preset = PRESETS[name]
    kind = "gemma4_unified" if name == "gemma-4-12b" else "gemma4"
    fields = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings",
        "sliding_window", "layer_types", "global_head_dim", "num_global_key_value_heads",
        "attention_k_eq_v", "num_kv_shared_layers", "use_double_wide_mlp",
        "hidden_size_per_layer_input", "final_logit_softcapping", "num_experts", "top_k_experts",
        "moe_intermediate_size",
    )  # fmt: skip
    text = {field: getattr(preset, field) for field in fields}
    text["enable_moe_block"] = preset.num_experts > 0
    text |= {"layer_types": list(preset.layer_types), "model_type": f"{kind}_text"}
    assert config_from_json(text) == preset
    assert config_from_json({"model_type": kind, "text_config": text}) == preset
    theirs = transformers_class(kind, "TextConfig").from_dict(text)
    assert config_from_json(theirs.to_dict()) == preset
    assert stored_shapes(preset) == tensors(kind, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_missing_fields_have_transformers_defaults(kind):
    saved = transformers.AutoConfig.for_model(f"{kind}_text").to_dict()
    config = config_from_json({"model_type": f"{kind}_text"})
    assert config == config_from_json(saved)
    assert config.max_position_embeddings == saved["max_position_embeddings"]
    assert config.sliding_window == saved["sliding_window"]
    multimodal = transformers.AutoConfig.for_model(kind).to_dict()
    assert config_from_json(multimodal) == config
    assert config_from_json({"model_type": kind, "text_config": {}}) == config


def test_defaults_of_the_two_classes_differ():
    plain, unified = (config_from_json({"model_type": f"{kind}_text"}) for kind in KINDS)
    assert (plain.max_position_embeddings, plain.sliding_window) == (131_072, 512)
    assert (unified.max_position_embeddings, unified.sliding_window) == (262_144, 1024)
    assert (plain.hidden_size_per_layer_input, unified.hidden_size_per_layer_input) == (256, 0)
    assert plain.final_logit_softcapping is None
    assert (plain.query_pre_attn_scalar, plain.head_dim, plain.global_head_dim) == (1, 256, 512)


@pytest.mark.parametrize("kind", KINDS)
def test_final_soft_cap_of_a_multimodal_model_is_applied(kind):
    config = config_from_json(
        {"model_type": kind, "text_config": TEXT | {"final_logit_softcapping": 30.0}}
    )
    assert config.final_logit_softcapping == 30


def test_last_layer_is_full_with_a_warning_as_in_transformers():
    given = {"model_type": "gemma4_text"} | TEXT | {"layer_types": [SLIDING, FULL, *[SLIDING] * 3]}
    with pytest.warns(UserWarning, match="here: the last layer has type 'sliding_attention'"):
        config = config_from_json(given, "here")
    assert config.layer_types == (SLIDING, FULL, SLIDING, SLIDING, FULL)
    assert list(config.layer_types) == transformers.Gemma4TextConfig.from_dict(given).layer_types


def refused(change: dict, message: str, kind: str = "gemma4_text") -> None:
    with pytest.raises(ValueError, match=message):
        config_from_json({"model_type": kind} | TEXT | change)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"full_attention": {"head_dim": 16}}, "'full_attention'.* the index of a layer, from 0"),
        ({"5": {}}, "'5'.*from 0 to 4"),
        ({"-1": {}}, "'-1'"),
        ({"9" * 5000: {}}, "index of a layer"),
        ({"0": 3}, "'0': 3"),
        ([{}], "must be a JSON object"),
        ("x", "per_layer_config='x' must be"),
        ({"2": {"head_dim": 16}}, r"layer 4 has .*\[8, 2\].* full_attention has \[16, 2\]"),
        ({"0": {"num_key_value_heads": 1}}, "layers of one type must have one shape here"),
        ({"0": {"intermediate_size": 40}}, "intermediate_size=40 of layer 0 is not supported"),
        ({"0": {"skip": ["mlp"]}}, r"skip=\['mlp'\] of layer 0"),
        ({"2": {"head_dim": "16"}, "4": {"head_dim": "16"}}, "global_head_dim='16' must be"),
        ({str(i): {"head_dim": 10**12} for i in range(5)}, "head_dim=1000000000000 must be"),
        ({"2": {"num_key_value_heads": 3}, "4": {"num_key_value_heads": 3}}, "not divisible by"),
    ],
)
def test_bad_objects_for_layers_are_refused(given, message):
    refused({"per_layer_config": given}, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enable_moe_block": True}, "num_experts is missing, but enable_moe_block is true"),
        ({"enable_moe_block": "yes"}, "enable_moe_block='yes' must be true or false"),
        ({"enable_moe_block": 1}, "enable_moe_block=1 must be true or false"),
        (EXPERTS | {"num_experts": None}, "num_experts is missing"),
        (EXPERTS | {"top_k_experts": None}, "top_k_experts is missing"),
        (EXPERTS | {"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
        (EXPERTS | {"num_experts": 0}, "num_experts=0 must be an integer from 1 to 1024"),
        (EXPERTS | {"num_experts": 1025}, "num_experts=1025 must be"),
        (EXPERTS | {"num_experts": 1 << 40}, "num_experts=1099511627776 must be"),
        (EXPERTS | {"num_experts": True}, "num_experts=True must be"),
        (EXPERTS | {"num_experts": 4.0}, r"num_experts=4\.0 must be"),
        (EXPERTS | {"top_k_experts": 5}, "num_experts=4 with top_k_experts=5"),
        (EXPERTS | {"top_k_experts": -1}, "top_k_experts=-1 must be"),
        (EXPERTS | {"moe_intermediate_size": 0}, "moe_intermediate_size=0 must be"),
        (EXPERTS | {"moe_intermediate_size": 1 << 17}, "moe_intermediate_size=131072 must be"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_activation": "silu"}, "hidden_activation='silu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"num_kv_shared_layers": 4}, "num_kv_shared_layers=4 leaves no layer of type full_attent"),
        ({"num_kv_shared_layers": -1}, "num_kv_shared_layers=-1"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000"),
        ({"num_hidden_layers": "5"}, "num_hidden_layers='5'"),
        ({"layer_types": [SLIDING, FULL]}, "layer_types=.* must be a list of 5 layer types"),
        ({"layer_types": FULL}, "layer_types='full_attention' must be a list"),
        ({"layer_types": ["global"] * 4 + [FULL]}, "layer_types has .*'global'"),
        ({"global_head_dim": 7}, "global_head_dim=7 is odd"),
        ({"global_head_dim": 1 << 30}, "global_head_dim=1073741824"),
        (KEYS_ARE_VALUES | {"num_global_key_value_heads": 3}, "num_global_key_value_heads=3"),
        ({"attention_k_eq_v": "yes"}, "attention_k_eq_v='yes' must be a bool"),
        ({"use_double_wide_mlp": 1}, "use_double_wide_mlp=1 must be a bool"),
        ({"hidden_size_per_layer_input": 1 << 40}, "hidden_size_per_layer_input=1099511627776"),
        ({"hidden_size_per_layer_input": None, "vocab_size_per_layer_input": 9}, "is below vocab"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"rope_parameters": {}}, "needs an object for full_attention"),
        ({"rope_parameters": {FULL: {"rope_theta": 1e6}}}, "needs an object for sliding_attention"),
        ({"rope_parameters": {FULL: {"rope_type": "default"}, SLIDING: {}}}, "needs a rope_theta"),
        ({"rope_parameters": 3}, "rope_parameters=3 must be a JSON object"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ],
    ids=str,
)  # fmt: skip
def test_unsupported_configs_are_refused(change, message):
    refused(change, message)


@pytest.mark.parametrize(
    "change",
    [
        {"per_layer_config": {"0": {"x" * 9999: 1}}},
        {"rope_parameters": {FULL: {"rope_type": "x" * 9999, "rope_theta": 1e4}}},
    ],
)
def test_messages_do_not_repeat_long_names(change):
    with pytest.raises(ValueError, match="x" * 20) as error:
        config_from_json({"model_type": "gemma4_text"} | TEXT | change)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "change",
    [
        {"x" * 9999: 1},
        {"rope_parameters": {FULL: {"rope_theta": 1e4, "x" * 9999: 1}, SLIDING: {"rope_theta": 1}}},
    ],
)
def test_warnings_do_not_repeat_long_names(change):
    with pytest.warns(UserWarning, match="x" * 20) as warned:
        config_from_json({"model_type": "gemma4_text"} | TEXT | change)
    assert all(len(str(warning.message)) < 500 for warning in warned)


@pytest.mark.parametrize("value", [-0.1, 1.5, "0.25", float("nan"), True])
def test_share_of_rotating_pairs_is_checked(value):
    full = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": value}
    rope = {FULL: full, SLIDING: {"rope_theta": 1e4}}
    refused({"rope_parameters": rope}, "full_rope: partial_rotary_factor=")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gemma4"}, "text model has model_type gemma4_text"),
        ({"model_type": "gemma4_unified", "text_config": 3}, "text_config=3 must be"),
        (
            {"model_type": "gemma4", "text_config": {"model_type": "gemma4_unified_text"}},
            "'gemma4_unified_text' is not gemma4_text",
        ),
        ({"model_type": "gemma4_assistant"}, "'gemma4_assistant' is not one of"),
        (
            {"model_type": "gemma4", "text_config": TEXT | {"enable_moe_block": True}},
            "num_experts is missing",
        ),
    ],
)
def test_bad_multimodal_configs_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        config_from_json(config)


@pytest.mark.parametrize("enabled", [False, None, "absent"])
def test_fields_of_a_mixture_of_experts_have_no_effect_without_one(recwarn, enabled):
    moe = {"num_experts": None, "top_k_experts": 1 << 40, "moe_intermediate_size": 704}
    moe |= {} if enabled == "absent" else {"enable_moe_block": enabled}
    given = {"model_type": "gemma4_text"} | TEXT
    assert config_from_json(given | moe) == config_from_json(given)
    assert isinstance(config_from_json(given), GemmaConfig) and not recwarn.list


def test_the_unified_class_has_no_mixture_of_experts():
    given = {"model_type": "gemma4_unified_text"} | TEXT
    assert config_from_json(given | EXPERTS) == config_from_json(given)


@pytest.mark.parametrize("change", [{}, SHARED, KEYS_ARE_VALUES, {"num_experts": 1024}], ids=str)
def test_experts_have_transformers_tensors(change):
    given = {"model_type": "gemma4_text"} | TEXT | EXPERTS | change
    config = config_from_json(given)
    theirs = transformers.Gemma4TextConfig.from_dict(given)
    assert stored_shapes(config) == tensors("gemma4", theirs)
    assert config_from_json(theirs.to_dict()) == config
    multimodal = {"model_type": "gemma4", "text_config": given}
    assert config_from_json(multimodal) == config
