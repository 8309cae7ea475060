"""Checks that from_pretrained knows every keyword of transformers' from_pretrained. Also checks
that forward takes and returns the cache under both of its names."""

import inspect
import re

import pytest
import torch
import transformers
from tiny_models import CONFIGS, close, random_model

import gemma_fast
from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.checkpoint.transformers import CLASSES
from gemma_fast.compat import FROM_PRETRAINED

OURS = {"dtype", "device", "device_map", "torch_dtype"}
INTERNAL = {"_commit_hash", "_from_auto", "_from_pipeline"}
THEIRS = transformers.PreTrainedModel.from_pretrained


def test_every_keyword_of_transformers_is_known():
    source = inspect.getsource(THEIRS)
    popped = set(re.findall(r'kwargs\.(?:pop|get)\("(\w+)"', source))
    named = {
        name for name, x in inspect.signature(THEIRS).parameters.items() if x.kind == x.KEYWORD_ONLY
    }
    assert popped | named <= OURS | INTERNAL | FROM_PRETRAINED.keys()


@pytest.mark.parametrize("name", FROM_PRETRAINED)
def test_a_keyword_has_no_effect_or_its_error_names_a_way_out(name, tmp_path):
    """An empty directory shows that keywords are checked first."""
    same, way_out = FROM_PRETRAINED[name]
    if way_out:
        with pytest.raises(TypeError, match=re.escape(way_out)):
            GemmaForCausalLM.from_pretrained(tmp_path, **{name: object()})
    for value in same if isinstance(same, tuple) else (object(),):
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            GemmaForCausalLM.from_pretrained(tmp_path, **{name: value})


def test_forward_takes_and_returns_the_cache_under_both_names():
    model = random_model(CONFIGS["gemma3-gqa"])
    ids = torch.arange(3, 23)[None]
    expected = model(ids).logits[:, 10:]
    for name in ("cache", "past_key_values"):
        out = model(ids[:, :10])
        assert out.cache is out.past_key_values is out["cache"] is out[1]
        assert out["logits"] is out.logits
        again = model(ids[:, 10:], **{name: out.cache}).logits
        close(again, expected)
    out = model(ids)
    with pytest.raises(TypeError, match="both cache and past_key_values"):
        model(ids, cache=out.cache, past_key_values=out.cache)


def test_each_text_class_of_transformers_has_its_name_here():
    names = [name for name in CLASSES if name.endswith("ForCausalLM")]
    assert all(getattr(gemma_fast, name) is GemmaForCausalLM for name in names)
    assert len(names) == 5
