"""Changes each field of transformers' Gemma configs in a saved config.json. The logits must change
as transformers' do, or loading must raise an error that names the field."""

import dataclasses
import json

import pytest
import torch
import transformers
from tiny_models import CONFIGS, TOLERANCE, close, random_transformers_model, two_layers

from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.checkpoint import config_json
from gemma_fast.config import FULL, SHAPES, SLIDING
from gemma_fast.reference import Reference

CLASSES = {
    "gemma": [transformers.GemmaConfig],
    "gemma2": [transformers.Gemma2Config],
    "gemma3": [transformers.Gemma3TextConfig, transformers.Gemma3Config],
    "gemma4": [transformers.Gemma4TextConfig, transformers.Gemma4Config],
    "gemma4_unified": [transformers.Gemma4UnifiedTextConfig, transformers.Gemma4UnifiedConfig],
}
GEMMA_4 = ("gemma4", "gemma4_unified")
PER_TYPE = ("gemma3", *GEMMA_4)  # families with rotary parameters for each layer type
ALL, WINDOWED = tuple(CLASSES), ("gemma2", "gemma3", *GEMMA_4)
IDS = torch.arange(3, 43)[None]
TINY = {
    "gemma": two_layers("gemma-mqa"), "gemma2": two_layers("gemma2-gqa"),
    "gemma3": two_layers("gemma3-gqa"), "gemma4": CONFIGS["gemma4-all"],
    "gemma4_unified": CONFIGS["gemma4-k-eq-v"],
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 2.0}
YARN |= {"original_max_position_embeddings": 64}
PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 100.0}
# Field → changed values. Fields that are not in config.json are added.
CHANGES = {
    "attention_bias": [True],
    "attention_dropout": [0.5],
    "architectures": [["Other"]],
    "attn_logit_softcapping": [1.5, None],
    "bos_token_id": [5, None],
    "chunk_size_feed_forward": [2],
    "dtype": ["bfloat16"],
    "enable_moe_block": [False, True],
    "eos_token_id": [7, [7, 8], None],
    "final_logit_softcapping": [1.0, None],
    "hidden_act": ["gelu", "silu", "relu"],
    "hidden_activation": ["gelu", "silu", "relu"],
    "id2label": [{"0": "x"}],
    "initializer_range": [0.5],
    "is_encoder_decoder": [True],
    "label2id": [{"x": 0}],
    "layer_types": [[FULL, SLIDING], [FULL, FULL], None],
    "max_position_embeddings": [64],
    "moe_intermediate_size": [8],
    "num_experts": [4],
    "original_max_position_embeddings": [16],
    "output_hidden_states": [True],
    "pad_token_id": [5, None],
    "partial_rotary_factor": [0.5],
    "problem_type": ["regression"],
    "query_pre_attn_scalar": [7],
    "return_dict": [False],
    "rms_norm_eps": [0.1],
    "rope_local_base_freq": [50.0],
    "rope_parameters": [
        None,
        {"rope_type": "default", "rope_theta": 100.0},
        {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
        {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
        {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        YARN,
        YARN | {"truncate": False},
        YARN | {"mscale": 2.0, "mscale_all_dim": 0.5},
        YARN | {"attention_factor": 1.5, "beta_slow": 0.5},
        {FULL: {"rope_type": "default", "rope_theta": 100.0}, SLIDING: {"rope_type": "default"}},
        {FULL: YARN, SLIDING: {"rope_type": "linear", "factor": 2.0}},
        {FULL: {"rope_type": "default"}, SLIDING: YARN | {"truncate": False}},
        {FULL: {"rope_theta": 100.0}, SLIDING: YARN | {"truncate": False}},
        {FULL: PROPORTIONAL | {"partial_rotary_factor": 0.7}, SLIDING: PROPORTIONAL},
        {FULL: PROPORTIONAL | {"factor": 4.0}, SLIDING: {"rope_type": "linear", "factor": 2.0}},
    ],
    "rope_scaling": [
        {"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}, YARN,
    ],
    "rope_theta": [100.0],
    "sliding_window": [3],
    "sliding_window_pattern": [1],
    "_sliding_window_pattern": [1],
    "tie_word_embeddings": [False],
    "top_k_experts": [2],
    "use_bidirectional_attention": [True, None, "all", "vision"],
    "use_cache": [False],
}  # fmt: skip
# Fields of Gemma 4 that change the shapes of tensors: test_gemma4_json.py tests them.
SHAPES_OF_GEMMA_4 = {
    "attention_k_eq_v", "hidden_size_per_layer_input", "num_kv_shared_layers",
    "use_double_wide_mlp", "vocab_size_per_layer_input",
}  # fmt: skip
# Fields with a value that transformers itself cannot run.
NOT_RUN = {("gemma", "layer_types"), *((family, "return_dict") for family in ALL)}
# Patterns of error messages that do not contain the field's name.
MESSAGES = {
    "layer_types": "layer_types|layers of one type", "rope_parameters": "rope_",
    "tie_word_embeddings": "lm_head",
}  # fmt: skip
# Values that are refused, although transformers runs them.
REFUSED = {
    "attention_bias": ALL, "is_encoder_decoder": ALL, "partial_rotary_factor": ALL,
    "hidden_act": ("gemma",), "hidden_activation": WINDOWED,
}  # fmt: skip


@pytest.fixture(scope="module", params=TINY)
def saved(request, tmp_path_factory):
    """Returns family, directory and config.json of a saved tiny model."""
    path = tmp_path_factory.mktemp(request.param)
    random_transformers_model(TINY[request.param]).save_pretrained(path)
    (path / "generation_config.json").unlink()  # its end tokens come before those of config.json
    config = json.loads((path / "config.json").read_text())
    if request.param == "gemma4_unified":  # the same model, saved from another class
        config["model_type"] = "gemma4_unified_text"
        (path / "config.json").write_text(json.dumps(config))
    return request.param, path, config


def is_refused(family, field, value):
    """Returns whether loading must raise, although transformers runs this value."""
    if field == "rope_parameters" and value is not None:
        per_type = FULL in value
        if per_type and family in GEMMA_4:  # transformers fails without a theta
            return not all("rope_theta" in rope for rope in value.values())
        special = "llama3" in str(value) or "proportional" in str(value)
        return per_type != (family in PER_TYPE) or special
    if field == "rope_scaling" and family in GEMMA_4:
        return True  # transformers fails
    if field == "use_bidirectional_attention":
        return value not in ((None, "vision") if family in GEMMA_4 else (None,))
    if field == "enable_moe_block":
        return value is True and family == "gemma4"
    if field == "layer_types" and family in GEMMA_4:
        return True  # the tensors of another layer type have other shapes
    if field == "tie_word_embeddings":
        return True  # the file has no head; transformers initializes one at random
    return family in REFUSED.get(field, ()) and not (field == "hidden_act" and value == "gelu")


def rms(x):
    return x.square().mean().sqrt()


@pytest.mark.filterwarnings("ignore:config.json", "ignore:.*the last layer has type")
@pytest.mark.parametrize("field", CHANGES)
def test_each_field_has_the_effect_that_it_has_in_transformers(saved, field):
    family, path, config = saved
    for value in CHANGES[field]:
        (path / "config.json").write_text(json.dumps(config | {field: value}))
        if is_refused(family, field, value):
            with pytest.raises(ValueError, match=MESSAGES.get(field, field)):
                GemmaForCausalLM.from_pretrained(path, device="cpu")
            continue
        model = GemmaForCausalLM.from_pretrained(path, device="cpu")
        try:
            hf = transformers.AutoModelForCausalLM.from_pretrained(
                path, attn_implementation="eager"
            )
            expected = hf(IDS).logits
        except (AttributeError, KeyError):
            assert (family, field) in NOT_RUN
            continue
        assert model.dtype == hf.dtype, value
        ends = hf.generation_config.eos_token_id
        assert model.config.eos_token_id == (tuple(ends) if isinstance(ends, list) else ends or ())
        error, size = model(IDS).logits.float() - expected.float(), rms(expected.float())
        if hf.dtype == torch.bfloat16:  # both differ from fp32 by up to 0.06 * size
            assert rms(error) < 0.1 * size, value
        else:
            assert error.abs().max() < TOLERANCE * size, value


@pytest.mark.parametrize("family", TINY)
def test_every_field_of_transformers_configs_is_in_one_table(family):
    fields = {field.name for config in CLASSES[family] for field in dataclasses.fields(config)}
    saved = {name for config in CLASSES[family] for name in config().to_dict()}
    refused = config_json.REFUSED
    known = {*config_json.APPLIED, *(rule.field for rule in refused), *config_json.IGNORED}
    assert fields | saved <= known, "a field of config.json has no effect here"
    applied = [name for name, families in config_json.APPLIED.items() if family in families]
    applied += [rule.field for rule in refused if family in rule.families]
    applied += config_json.IGNORED
    assert len(applied) == len(set(applied)), "a field is in two tables"
    tested = {*CHANGES, *SHAPES, *SHAPES_OF_GEMMA_4, "model_type", "transformers_version"}
    assert {field.name for field in dataclasses.fields(CLASSES[family][0])} <= tested


def test_an_unknown_field_gives_a_warning(saved):
    _, path, config = saved
    (path / "config.json").write_text(json.dumps(config | {"attention_sinks": 4}))
    with pytest.warns(UserWarning, match="attention_sinks=4 is unknown"):
        GemmaForCausalLM.from_pretrained(path, device="cpu")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_scaling", {"rope_type": "linear", "factor": 4.0}),
        ("rope_scaling", YARN),
        ("rope_scaling", YARN | {"factor": None}),
        ("rope_theta", 100.0),
        ("rope_local_base_freq", 50.0),
    ],
    ids=str,
)  # fmt: skip
def test_rotary_fields_of_transformers_4_are_read(saved, field, value):
    family, path, config = saved
    old = {name: config[name] for name in config if name != "rope_parameters"} | {field: value}
    (path / "config.json").write_text(json.dumps(old))
    if field == "rope_scaling" and family in GEMMA_4:  # transformers fails
        with pytest.raises(ValueError, match="rope_scaling is not supported for Gemma 4"):
            GemmaForCausalLM.from_pretrained(path, device="cpu")
        return
    model = GemmaForCausalLM.from_pretrained(path, device="cpu")
    hf = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    close(model(IDS).logits, hf(IDS).logits)
    reference = Reference.from_pretrained(path)
    close(reference(IDS).logits, hf(IDS).logits)


def test_a_type_that_transformers_5_ignores_is_refused():
    config = {"model_type": "gemma3_text", "rope_scaling": {"type": "linear", "factor": 8.0}}
    with pytest.raises(ValueError, match="write `rope_type`"):
        config_json.config_from_json(config)
