"""Tests that wrong arguments to the model raise errors that name the problem."""

import re
from types import SimpleNamespace

import pytest
import torch
from marks import ALL_FAMILIES
from tiny_models import CONFIGS, random_model

from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.load import pick_device, pick_dtype
from gemma_fast.model.cache import KVCache


@pytest.fixture(scope="module")
def model() -> GemmaForCausalLM:
    return random_model(CONFIGS["gemma3-mqa"])


def ids(tokens: int = 4) -> torch.Tensor:
    return torch.full((1, tokens), 7)


@pytest.mark.parametrize(
    ("input_ids", "message"),
    [
        (torch.tensor([[2, 199]]), "token id 199 is outside the vocabulary of 199"),
        (torch.tensor([[-1, 5]]), "token id -1 is outside"),
        (torch.zeros(1, 0, dtype=torch.long), "the prompt is empty"),
        (torch.zeros(0, 3, dtype=torch.long), "the prompt is empty"),
        (torch.tensor([2, 3]), r"integers \[batch, tokens\], not torch.int64 \(2,\)"),
        (torch.ones(1, 3, dtype=torch.bool), r"integers \[batch, tokens\], not torch.bool"),
        ([[2, 3]], 'must be a tensor, not a list: .*return_tensors="pt"'),
        ({"input_ids": torch.ones(1, 2).long()}, r"not a dict: .*generate\(\*\*inputs\)"),
        (torch.ones(1, 3, dtype=torch.complex64), "not torch.complex64"),
        (torch.full((1, 3), 200, dtype=torch.uint8), "token id 200 is outside"),
        (torch.ones(1, 3), r"integers \[batch, tokens\], not torch.float32"),
    ],
    ids=str,
)
def test_bad_input_ids_are_refused(model, input_ids, message):
    with pytest.raises(ValueError, match=message):
        model(input_ids)
    with pytest.raises(ValueError, match=message):
        model.generate(input_ids, max_new_tokens=2)


@ALL_FAMILIES
def test_float16_is_refused_for_gemma_3_and_4_only(model, twins):
    if twins.config.model_type in ("gemma3", "gemma4"):
        with pytest.raises(ValueError, match="overflows float16: use bfloat16 or float32"):
            GemmaForCausalLM.from_pretrained(twins.path, dtype="float16")
        half = random_model(twins.config).half()
        with pytest.raises(ValueError, match="overflows float16"):
            half(ids())
    else:
        half = GemmaForCausalLM.from_pretrained(twins.path, dtype="float16")
        assert half(ids()).logits.isfinite().all()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 0, 1, 1]], "has holes"),
        ([[1, 1, 1]], r"attention_mask must be a tensor of shape \(1, 4\), not \(1, 3\)"),
        ([[1, 1, 1, 1]] * 2, r"attention_mask must be a tensor of shape \(1, 4\), not \(2, 4\)"),
    ],
    ids=str,
)
def test_bad_attention_mask_is_refused(model, mask, message):
    with pytest.raises(ValueError, match=message):
        model(ids(), attention_mask=torch.tensor(mask))


def test_attention_mask_that_disagrees_with_the_cache_is_refused(model):
    cache = model(ids(), attention_mask=torch.tensor([[0, 1, 1, 1]])).past_key_values
    with pytest.raises(ValueError, match="disagrees with the padding of the cached tokens"):
        model(ids(1), attention_mask=torch.tensor([[0, 0, 1, 1, 1]]), past_key_values=cache)
    assert cache.get_seq_length() == 4
    model(ids(1), attention_mask=torch.tensor([[0, 1, 1, 1, 1]]), past_key_values=cache)


def test_attention_mask_that_unmasks_cached_padding_is_refused(model):
    """All cached tokens of the first row are padding. A later mask must not unmask them."""
    padding = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])
    cache = model(ids().repeat(2, 1), attention_mask=padding).past_key_values
    with pytest.raises(ValueError, match="disagrees with the padding of the cached tokens"):
        model(ids(1).repeat(2, 1), attention_mask=torch.ones(2, 5), past_key_values=cache)


def test_refused_call_stores_no_padding_in_the_cache(model):
    cache = KVCache(model.config, 1, 5, dtype=torch.float32)
    with pytest.raises(ValueError, match="do not fit"):
        model(ids(6), attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1]]), past_key_values=cache)
    assert torch.equal(model(ids(), past_key_values=cache).logits, model(ids()).logits)


def test_position_ids_must_continue_the_cache(model):
    mask = torch.tensor([[0, 1, 1, 1]])
    positions = torch.tensor([[1, 0, 1, 2]])
    expected = model(ids(), attention_mask=mask).logits
    given = model(ids(), attention_mask=mask, position_ids=positions).logits
    assert torch.equal(given, expected)
    message = re.escape("position_ids must continue the cache") + ".*3, 4, 5, 6"
    with pytest.raises(ValueError, match=message):
        model(ids(), position_ids=torch.tensor([[3, 4, 5, 6]]))
    cache = model(ids(), attention_mask=mask).past_key_values
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match=message.split(".*")[0]):
        model(ids(1), mask, position_ids=torch.tensor([[4]]), past_key_values=cache)
    model(ids(1), mask, position_ids=torch.tensor([[3]]), past_key_values=cache)


def test_error_for_a_full_cache_names_the_length_needed(model):
    cache = KVCache(model.config, 1, 5, dtype=torch.float32)
    model(ids(4), past_key_values=cache)
    message = r"4 tokens so far and 2 more do not fit the cache of 5: .*max_length=6"
    with pytest.raises(ValueError, match=message):
        model(ids(2), past_key_values=cache)
    assert model(ids(1), past_key_values=cache).past_key_values.length == 5


def test_cache_made_by_the_model_grows_up_to_the_context_length(model):
    cache = model(ids(200)).past_key_values
    assert model(ids(56), past_key_values=cache).past_key_values.max_length == 256
    with pytest.raises(ValueError, match="256 tokens so far and 1 more do not fit the model's con"):
        model(ids(1), past_key_values=cache)


def test_cache_for_another_batch_dtype_or_config_is_refused(model):
    with pytest.raises(ValueError, match="must be a KVCache from an earlier call, not a tuple"):
        model(ids(), past_key_values=())
    cache = model(ids()).past_key_values
    message = "cache is for a batch of 1 in float32 on cpu, but this call is a batch of 2"
    with pytest.raises(ValueError, match=message):
        model(torch.full((2, 1), 7), past_key_values=cache)
    other = KVCache(CONFIGS["gemma-mqa"], 1, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match="a model with another config"):
        model(ids(), past_key_values=other)
    with pytest.raises(ValueError, match="max_length=-3 must both be at least 1"):
        KVCache(model.config, 1, -3, dtype=torch.float32)
    half = KVCache(model.config, 1, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"in bfloat16 on cpu, but .* in float32"):
        model(ids(), past_key_values=half)


def test_prompt_longer_than_the_context_is_refused(model):
    with pytest.raises(ValueError, match="0 tokens so far and 257 more do not fit the model's con"):
        model(ids(257))


def test_right_padded_cache_cannot_be_continued(model):
    cache = model(ids(), attention_mask=torch.tensor([[1, 1, 1, 0]])).past_key_values
    with pytest.raises(ValueError, match="cannot be continued: it contains padding on the right"):
        model(ids(1), past_key_values=cache)


def test_cache_of_an_interrupted_call_cannot_be_continued(model, monkeypatch):
    cache = model(ids()).past_key_values
    with monkeypatch.context() as patch:
        patch.setattr(cache, "keep", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model(ids(), past_key_values=cache)
    with pytest.raises(ValueError, match="a forward pass did not finish; start with a new one"):
        model(ids(), past_key_values=cache)


def test_refused_call_leaves_the_cache_unchanged(model):
    mask = torch.tensor([[0, 1, 1, 1, 1, 1]])
    cache = model(ids(), attention_mask=mask[:, :4]).past_key_values
    wrong = torch.tensor([[9, 9]])
    with pytest.raises(ValueError, match="position_ids must continue"):
        model(ids(2), attention_mask=mask, position_ids=wrong, past_key_values=cache)
    with pytest.raises(
        ValueError, match=r"position_ids must be a tensor of shape \(1, 2\), not \(1, 3\)"
    ):
        model(ids(2), position_ids=torch.ones(1, 3), past_key_values=cache)
    out = model(ids(2), attention_mask=mask, past_key_values=cache).logits
    expected = model(ids(6), attention_mask=mask).logits[:, -2:]
    torch.testing.assert_close(out, expected)


def test_negative_logits_to_keep_is_refused(model):
    with pytest.raises(ValueError, match="logits_to_keep=-1 must be"):
        model(ids(), logits_to_keep=-1)


def test_unknown_keywords_are_refused_and_named(model, twins):
    with pytest.raises(TypeError, match="output_attentions"):
        model(ids(), output_attentions=True)
    with pytest.raises(TypeError, match="load_in_8bit"):
        GemmaForCausalLM.from_pretrained(twins.path, load_in_8bit=True)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is not one of auto, float32"),
        ({"dtype": torch.int32}, "torch.int32"),
        ({"device": "abacus"}, "device 'abacus' is unknown"),
        ({"device": "meta"}, "device meta is not supported"),
        ({"device": "cuda:99"}, "cuda:99 is not available: PyTorch finds"),
        ({"device_map": {"model.layers.0": 0, "": 1}}, "the model runs on one device"),
        ({"device_map": {"model.embed_tokens_per_layer": "cuda", "": 1}}, "may be on 'cpu'"),
    ],
    ids=str,
)
def test_bad_from_pretrained_arguments_are_refused(twins, kwargs, message):
    with pytest.raises(ValueError, match=message):
        GemmaForCausalLM.from_pretrained(twins.path, **kwargs)


def test_device_and_dtype_are_picked_from_arguments_and_checkpoint():
    cpu, first = torch.device("cpu"), torch.device("cpu:0")
    default = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device(None, None) == pick_device(None, "auto") == default
    assert pick_device(None, {"": "cpu:0"}) == pick_device("cpu:0", "cpu") == first
    assert pick_device(None, {"": "cpu:0", "model.embed_tokens_per_layer": "cpu"}) == first
    half, gguf = SimpleNamespace(dtype=torch.bfloat16), SimpleNamespace(dtype=None)
    assert pick_dtype("auto", half, cpu) == torch.bfloat16
    assert pick_dtype("auto", gguf, cpu) == torch.float32
    assert pick_dtype("auto", SimpleNamespace(dtype=torch.float64), cpu) == torch.float32
    assert pick_dtype("auto", gguf, torch.device("cuda")) == torch.bfloat16
    assert pick_dtype("float16", half, cpu) == pick_dtype(torch.float16, gguf, cpu) == torch.float16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(twins):
    with pytest.raises(ValueError, match="device cuda is not available"):
        GemmaForCausalLM.from_pretrained(twins.path, device="cuda")
