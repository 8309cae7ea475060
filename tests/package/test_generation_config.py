"""Tests that each field of transformers' GenerationConfig is applied, without effect or refused."""

import inspect
import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import CONFIGS, Twins

from gemma_fast import GemmaForCausalLM, GenerationConfig
from gemma_fast.compat import APPLIED, GENERATE, NO_EFFECT, REFUSED

FIELDS = set(vars(transformers.GenerationConfig())) | {"_commit_hash"}  # until transformers 5.17
DEFAULTS = transformers.GenerationConfig._get_default_generation_params()
IDS = torch.tensor([[2, 5, 9, 17]])
GREEDY = {"max_new_tokens": 6, "eos_token_id": [], "do_sample": False}
DOCS = Path(__file__).parents[2] / "docs" / "decoding.md"


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Twins:
    return Twins.build(CONFIGS["gemma2-gqa"], tmp_path_factory.mktemp("options"))


def with_file(one, path: Path, **fields) -> Path:
    """Copies the checkpoint to `path`, with these fields in its generation_config.json."""
    shutil.copytree(one.path, path, dirs_exist_ok=True)
    (path / "generation_config.json").write_text(json.dumps(fields))
    return path


def test_each_field_is_in_one_part_of_the_table():
    parts = [set(APPLIED), set(NO_EFFECT), set(REFUSED)]
    assert set.union(*parts) == FIELDS
    assert sum(map(len, parts)) == len(FIELDS)


def test_each_argument_of_generate_is_known():
    theirs = inspect.signature(transformers.GenerationMixin.generate).parameters
    ours = inspect.signature(GemmaForCausalLM.generate).parameters
    assert not theirs.keys() - ours.keys() - GENERATE.keys() - {"kwargs"}
    assert {"cache", "past_key_values", "attention_mask", "position_ids"} <= {*ours, *GENERATE}


def test_the_documentation_lists_the_same_table():
    rows = re.findall(r"^\| (applied|no effect|refused) \| (.*) \|", DOCS.read_text(), re.MULTILINE)
    listed = {part: set(re.findall(r"`(\w+)`", names)) for part, names in rows}
    metadata = {"transformers_version", "_from_model_config", "_commit_hash"}
    assert listed["applied"] == set(APPLIED)
    assert listed["no effect"] == set(NO_EFFECT) - metadata
    assert listed["refused"] == set(REFUSED)


def test_default_values_of_transformers_change_nothing_without_a_warning(one, monkeypatch):
    expected = one.model.generate(IDS, **GREEDY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(one.model.generate(IDS, generation_config=DEFAULTS, **GREEDY), expected)
        assert torch.equal(one.model.generate(IDS, **DEFAULTS | GREEDY), expected)
        monkeypatch.setattr(one.model, "generation_config", GenerationConfig(DEFAULTS))
        assert torch.equal(one.model.generate(IDS, **GREEDY), expected)
        whole = transformers.GenerationConfig(**DEFAULTS)
        assert torch.equal(one.model.generate(IDS, generation_config=whole, **GREEDY), expected)


@pytest.mark.parametrize("name", NO_EFFECT)
def test_options_without_effect_are_accepted(one, name):
    assert one.model.generate(IDS, **GREEDY, **{name: 3}).shape == (1, 10)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_options_raise_in_a_call_and_warn_in_a_file(one, name, monkeypatch):
    """The message names the field, its value and a way out."""
    values, way_out = REFUSED[name]
    value = next((not v if isinstance(v, bool) else 0.3 for v in values[:1] if v != "dynamic"), "x")
    message = re.escape(f"{name}={value!r} is not supported: {way_out}")
    for options in ({name: value}, {"generation_config": {name: value}}):
        with pytest.raises(TypeError, match=message):
            one.model.generate(IDS, **GREEDY, **options)
    expected = one.model.generate(IDS, **GREEDY)
    monkeypatch.setattr(one.model, "generation_config", GenerationConfig({name: value}))
    with pytest.warns(UserWarning, match=f"generation_config of the model: {message}; it"):
        assert torch.equal(one.model.generate(IDS, **GREEDY), expected)


def test_what_needs_beams_or_another_model_names_the_accelerated_model():
    named = {name for name, (_, way_out) in GENERATE.items() if "gemma_fast.hf" in way_out}
    assert named >= {"num_beams", "assistant_model", "constraints", "guidance_scale", "dola_layers"}
    assert set(REFUSED) <= named


def test_a_file_is_applied_and_its_other_fields_warn(one, tmp_path):
    """suppress_tokens of the file changes the text as in transformers; other fields are named."""
    free = one.model.generate(IDS, max_new_tokens=8, eos_token_id=[])
    fields = {
        "suppress_tokens": free[0, 5:7].tolist(),
        "repetition_penalty": 1.2,
        "eos_token_id": 1,
    }
    path = with_file(one, tmp_path, **fields, typical_p=0.7, thinking_budget=9, nothing=None)
    model = GemmaForCausalLM.from_pretrained(path, device="cpu")
    with pytest.warns(UserWarning, match="it is ignored") as found:
        out = model.generate(IDS, max_new_tokens=8)
    texts = [str(warning.message) for warning in found]
    assert len(texts) == 2 and all(f"generation_config of {path}:" in text for text in texts)
    assert any("typical_p=0.7 is not supported: use top_k" in text for text in texts)
    assert any("thinking_budget=9 is unknown" in text for text in texts)
    hf = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    expected = hf.generate(IDS, max_new_tokens=8, pad_token_id=0, do_sample=False)
    assert torch.equal(out, expected) and not torch.equal(out, free)


def test_stop_strings_of_a_file_need_a_tokenizer_as_in_transformers(one, tmp_path):
    class Letters:
        def decode(self, ids):
            return "".join(chr(0x4E00 + i) for i in ids)

    free = one.model.generate(IDS, **GREEDY)
    stop = Letters().decode([int(free[0, 6])])
    end = 5 + free[0, 4:].tolist().index(int(free[0, 6]))
    model = GemmaForCausalLM.from_pretrained(with_file(one, tmp_path, stop_strings=[stop]))
    with pytest.raises(ValueError, match="from the model's generation_config, needs tokenizer"):
        model.generate(IDS, **GREEDY)
    assert torch.equal(model.generate(IDS, tokenizer=Letters(), **GREEDY), free[:, :end])
    assert torch.equal(model.generate(IDS, stop_strings=[], **GREEDY), free)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with pytest.raises(ValueError, match="tokenizer"):
        hf.generate(IDS, max_new_tokens=2)


def test_each_known_option_is_an_attribute_of_our_generation_config():
    config = GenerationConfig(top_k=3)
    for name in FIELDS - {"top_k"}:
        assert getattr(config, name) is None
    config.suppress_tokens, config.num_beams = [5], 1
    assert config.to_dict() == {"top_k": 3, "suppress_tokens": [5], "num_beams": 1}
    with pytest.raises(TypeError, match=r"typical_p=0\.5 is not supported"):
        config.typical_p = 0.5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (GenerationConfig(), (1,)),  # nothing is set: the ids of the model's config
        (GenerationConfig({"eos_token_id": None}), ()),
        (GenerationConfig({"eos_token_id": [3, 4]}), (3, 4)),
        (transformers.GenerationConfig(eos_token_id=7), (7,)),
        (transformers.GenerationConfig(), ()),
    ],
    ids=str,
)
def test_end_tokens_are_those_of_any_kind_of_generation_config(one, monkeypatch, options, expected):
    monkeypatch.setattr(one.model, "generation_config", options)
    assert one.model.end_token_ids == expected
