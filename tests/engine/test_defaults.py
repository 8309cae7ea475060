"""Compares with transformers: options that are None, and ids that a generation_config.json lacks or
that are outside the vocabulary."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
import transformers
from tiny_models import CONFIGS, Twins
from verified_files import write_gguf_file

from gemma_fast import GemmaForCausalLM
from gemma_fast.compat import APPLIED, REFUSED

IDS = torch.tensor([[141, 55, 188, 14]])
PAIR = torch.tensor([[0, 0, 2, 5], [59, 23, 103, 28]])


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> tuple[Twins, int]:
    """Returns models, and the third greedy token after IDS."""
    twins = Twins.build(CONFIGS["gemma-mqa"], tmp_path_factory.mktemp("defaults"))
    free = twins.hf.generate(IDS, max_new_tokens=9, do_sample=False, eos_token_id=None)
    return twins, int(free[0, 6])


@pytest.fixture
def load(first, tmp_path):
    """Returns a function: fields of generation_config.json → model of transformers, our model."""

    def load(fields, **config):
        shutil.copytree(first[0].path, tmp_path, dirs_exist_ok=True)
        (tmp_path / "generation_config.json").write_text(json.dumps(fields))
        if fields is None:
            (tmp_path / "generation_config.json").unlink()
        settings = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(settings | config))
        hf = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, attn_implementation="eager", dtype=torch.float32
        )
        return hf, GemmaForCausalLM.from_pretrained(tmp_path, device="cpu", dtype="float32")

    return load


def both(models, ids, **options):
    """Returns the ids of each model's texts, or "refused"."""
    found = []
    for model in models:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found.append(model.generate(ids, **options).tolist())
            except (IndexError, ValueError):
                found.append("refused")
    return found


@pytest.mark.parametrize(
    "name",
    [
        "do_sample", "eos_token_id", "pad_token_id", "repetition_penalty", "max_new_tokens",
        "suppress_tokens", "min_new_tokens", "no_repeat_ngram_size",
        "temperature", "top_p", "bad_words_ids", "sequence_bias", "begin_suppress_tokens",
    ],
)  # fmt: skip
def test_a_keyword_that_is_none_switches_the_option_of_the_file_off(load, first, name):
    end = first[1]
    fields = {
        "do_sample": False, "eos_token_id": end, "pad_token_id": 3, "repetition_penalty": 1.9,
        "max_new_tokens": 5, "suppress_tokens": [5], "min_new_tokens": 4, "temperature": 0.5,
        "no_repeat_ngram_size": 1, "top_p": 0.9, "bad_words_ids": [[7]],
        "sequence_bias": [[[end], 4.0]], "begin_suppress_tokens": [9],
    }  # fmt: skip
    theirs, ours = both(load(fields), PAIR, attention_mask=(PAIR != 0).long(), **{name: None})
    assert ours == theirs != "refused"


def test_do_sample_none_is_greedy_and_top_k_none_keeps_all_tokens(load):
    models = load({"do_sample": True, "top_k": 3, "temperature": 0.5})
    theirs, ours = both(models, IDS, do_sample=None, max_new_tokens=5)
    assert ours == theirs
    options = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_scores": True}
    for kept, given in ((3, {}), (199, {"top_k": None}), (3, {"generation_config": {}})):
        for model in models:
            if model is models[1] or "generation_config" not in given:
                scores = model.generate(IDS, **options, **given).scores[0]
                assert scores.isfinite().sum() == kept


def test_none_in_a_generation_config_is_not_set(load, first):
    models = load({"eos_token_id": first[1], "repetition_penalty": 1.9, "max_new_tokens": 6})
    config = transformers.GenerationConfig(eos_token_id=None, repetition_penalty=None)
    theirs, ours = both(models, IDS, generation_config=config)
    assert ours == theirs
    nothing = {"eos_token_id": None, "repetition_penalty": None}
    assert both(models[1:], IDS, generation_config=nothing) == [theirs]


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize(
    "fields",
    [
        None, {"do_sample": False}, {"eos_token_id": None}, {"eos_token_id": "end"},
        {"pad_token_id": 0}, {"eos_token_id": "end", "pad_token_id": None},
        {"eos_token_id": ["end", 5000]}, {"eos_token_id": -1}, {"eos_token_id": [-1, "end"]},
        {"eos_token_id": -1, "min_new_tokens": 3}, {"eos_token_id": "end", "pad_token_id": 3},
    ],
    ids=str,
)  # fmt: skip
def test_ids_that_a_file_lacks_are_not_those_of_the_config(load, first, fields, masked):
    end = first[1]
    text = json.dumps(fields).replace('"end"', str(end))
    models = load(json.loads(text), eos_token_id=end, pad_token_id=0)
    for ids in (IDS, PAIR, torch.cat((IDS, PAIR))):
        mask = {"attention_mask": (ids != 0).long()} if masked else {}
        theirs, ours = both(models, ids, max_new_tokens=9, do_sample=False, **mask)
        assert ours == theirs
        assert theirs != "refused" or (-1 in (fields["eos_token_id"] or ()) and len(ids) > 1)


def test_an_option_that_is_set_later_keeps_the_ids_of_the_config(load, first):
    models = load(None, eos_token_id=first[1])
    for model in models:
        model.generation_config.max_new_tokens = 8
    theirs, ours = both(models, IDS)
    assert ours == theirs and len(ours[0]) < 12


def test_a_gguf_file_pads_with_the_token_of_its_metadata(tmp_path):
    model = GemmaForCausalLM.from_pretrained(write_gguf_file(tmp_path / "a.gguf", "gemma3"))
    assert model.generation_config.pad_token_id == model.config.pad_token_id
    assert model.end_token_ids and model.config.pad_token_id not in model.end_token_ids


@pytest.mark.parametrize("pad", [-1, 5000])
def test_padding_outside_the_vocabulary_runs_where_it_is_not_read(load, first, pad):
    end, options = first[1], {"max_new_tokens": 9, "do_sample": False}
    models = load({"eos_token_id": end, "pad_token_id": pad})
    theirs, ours = both(models, IDS, **options)
    assert ours == theirs and len(ours[0]) < 12
    two, mask = torch.cat((IDS, PAIR[1:])), torch.ones(2, 4).long()
    with pytest.raises(ValueError, match=f"pad_token_id={pad} is outside the vocabulary of 199"):
        models[1].generate(two, attention_mask=mask, **options)
    with pytest.raises(IndexError):
        models[0].generate(two, attention_mask=mask, **options)


def test_rows_are_filled_only_if_there_is_an_end_token_as_in_transformers(load, first):
    def stop(ids, scores, **_):
        return ids[:, -1] == first[1]

    criteria = transformers.StoppingCriteriaList([stop])
    two = torch.cat((IDS, PAIR[1:]))
    options = {"max_new_tokens": 9, "do_sample": False, "stopping_criteria": criteria}
    for end in (None, -1):
        models = load({"eos_token_id": end, "pad_token_id": 0})
        theirs, ours = both(models, two, attention_mask=torch.ones(2, 4).long(), **options)
        assert ours == theirs != "refused"


def test_numpy_integers_and_tensors_are_integers(load, first):
    _, model = load({"eos_token_id": 1})
    expected = model.generate(IDS, max_new_tokens=5, eos_token_id=first[1], pad_token_id=3)
    for kind in (np.int64, np.array, torch.tensor):
        options = {"max_new_tokens": kind(5), "eos_token_id": kind(first[1])}
        options |= {"pad_token_id": kind(3), "min_new_tokens": kind(1)}
        options |= {"suppress_tokens": torch.tensor([3, 5])}
        assert torch.equal(model.generate(IDS, **options), expected)


@pytest.mark.parametrize("rows", [1, 2])
def test_too_many_copies_are_refused_before_memory_is_allocated(first, rows):
    message = (
        f"num_return_sequences=1000000000 makes {rows}000000000 texts from {rows} prompts: one"
    )
    options = {"do_sample": True, "num_return_sequences": 10**9, "max_new_tokens": 2}
    with pytest.raises(ValueError, match=message):
        first[0].model.generate(IDS.repeat(rows, 1), **options)


WRONG = (
    5, -1, 0, 10**30, 10**400, 2.5, 1e39, float("nan"), "x", "", True, [5], [[5]], [[]], ["x"],
    [None], [[5, "x"]], [[[5], "x"]], [[[5], 10**400]], {"a": 1}, {"5": [1]}, [], {}, False,
)  # fmt: skip


@pytest.mark.parametrize("name", [*APPLIED, *REFUSED])
@pytest.mark.filterwarnings("ignore")
def test_no_value_of_a_file_is_a_type_error(first, monkeypatch, name):
    model = first[0].model
    for value in WRONG:
        monkeypatch.setattr(model, "generation_config", {"do_sample": True, name: value})
        new = {"max_new_tokens": 2} if name != "max_new_tokens" else {}
        problem = ""
        try:
            model.generate(IDS, **new)
        except ValueError as error:
            problem = str(error)
        assert not problem or name in problem or "not finite" in problem
