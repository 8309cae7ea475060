"""Changes each field of transformers' Gemma configs in a saved config.json. The logits must change
as transformers' do, or loading must raise an error that names the field."""

import dataclasses
import json

import pytest
import torch
import transformers
from tiny_models import TOLERANCE, close, random_transformers_model, two_layers

from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.checkpoint import config_json
from gemma_fast.config import FULL, SHAPES, SLIDING
from gemma_fast.reference import Reference

CONFIGS = {
    "gemma": transformers.GemmaConfig,
    "gemma2": transformers.Gemma2Config,
    "gemma3": transformers.Gemma3TextConfig,
}
ALL, WINDOWED = ("gemma", "gemma2", "gemma3"), ("gemma2", "gemma3")
IDS = torch.arange(3, 43)[None]
TINY = {"gemma": "gemma-mqa", "gemma2": "gemma2-gqa", "gemma3": "gemma3-gqa"}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 2.0}
YARN |= {"original_max_position_embeddings": 64}
# Field → changed values. Fields that are not in config.json are added.
CHANGES = {
    "attention_bias": [True],
    "attention_dropout": [0.5],
    "architectures": [["Other"]],
    "attn_logit_softcapping": [1.5, None],
    "bos_token_id": [5, None],
    "chunk_size_feed_forward": [2],
    "dtype": ["bfloat16"],
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
    ],
    "rope_scaling": [
        {"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}, YARN,
    ],
    "rope_theta": [100.0],
    "sliding_window": [3],
    "sliding_window_pattern": [1],
    "_sliding_window_pattern": [1],
    "tie_word_embeddings": [False],
    "use_bidirectional_attention": [True, None],
    "use_cache": [False],
}  # fmt: skip
# Fields with a value that transformers itself cannot run.
NOT_RUN = {("gemma", "layer_types"), *((family, "return_dict") for family in ALL)}
# Values that are refused, although transformers runs them.
REFUSED = {
    "attention_bias": ALL, "is_encoder_decoder": ALL, "partial_rotary_factor": ALL,
    "hidden_act": ("gemma",), "hidden_activation": WINDOWED,
}  # fmt: skip


@pytest.fixture(scope="module", params=TINY)
def saved(request, tmp_path_factory):
    """Returns family, directory and config.json of a saved tiny model."""
    path = tmp_path_factory.mktemp(request.param)
    random_transformers_model(two_layers(TINY[request.param])).save_pretrained(path)
    (path / "generation_config.json").unlink()  # its end tokens come before those of config.json
    return request.param, path, json.loads((path / "config.json").read_text())


def is_refused(family, field, value):
    """Returns whether loading must raise, although transformers runs this value."""
    if field == "rope_parameters" and value is not None:
        per_type = FULL in value
        return per_type == (family != "gemma3") or value.get("rope_type") == "llama3"
    if field == "use_bidirectional_attention":
        return value is True
    if field == "tie_word_embeddings":
        return True  # the file has no head; transformers initializes one at random
    return family in REFUSED.get(field, ()) and not (field == "hidden_act" and value == "gelu")


@pytest.mark.filterwarnings("ignore:config.json")
@pytest.mark.parametrize("field", CHANGES)
def test_each_field_has_the_effect_that_it_has_in_transformers(saved, field):
    family, path, config = saved
    for value in CHANGES[field]:
        (path / "config.json").write_text(json.dumps(config | {field: value}))
        if is_refused(family, field, value):
            name = "lm_head" if field == "tie_word_embeddings" else field
            with pytest.raises(ValueError, match=name if name != "rope_parameters" else "rope_"):
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
        error = (model(IDS).logits.float() - expected.float()).abs().max()
        tolerance = 0.2 if hf.dtype == torch.bfloat16 else TOLERANCE
        assert error < tolerance * expected.float().square().mean().sqrt(), value


@pytest.mark.parametrize("family", TINY)
def test_every_field_of_transformers_configs_is_in_one_table(family):
    classes = [CONFIGS[family]] + [transformers.Gemma3Config] * (family == "gemma3")
    fields = {field.name for config in classes for field in dataclasses.fields(config)}
    saved = {name for config in classes for name in config().to_dict()}
    tables = [set(config_json.APPLIED), set(config_json.REFUSED), config_json.IGNORED]
    assert fields | saved <= set.union(*tables), "a field of config.json has no effect here"
    assert sum(map(len, tables)) == len(set.union(*tables)), "a field is in two tables"
    tested = {*CHANGES, *SHAPES, "model_type", "text_config", "transformers_version"}
    assert {field.name for field in dataclasses.fields(CONFIGS[family])} <= tested


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
    _, path, config = saved
    old = {name: config[name] for name in config if name != "rope_parameters"} | {field: value}
    (path / "config.json").write_text(json.dumps(old))
    model = GemmaForCausalLM.from_pretrained(path, device="cpu")
    hf = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    close(model(IDS).logits, hf(IDS).logits)
    reference = Reference.from_pretrained(path)
    close(reference(IDS).logits, hf(IDS).logits)


def test_a_type_that_transformers_5_ignores_is_refused():
    config = {"model_type": "gemma3_text", "rope_scaling": {"type": "linear", "factor": 8.0}}
    with pytest.raises(ValueError, match="write `rope_type`"):
        config_json.config_from_json(config)
