"""Tests layers that read an earlier layer's keys and values: what they compute, and from what."""

import pytest
from tiny_models import close, left_padded

from gemma_fast.model.layer import Layer

pytestmark = pytest.mark.parametrize("twins", ["gemma4-shared", "gemma4-all"], indirect=True)


@pytest.fixture
def computed(monkeypatch) -> list[tuple[int, int]]:
    """Returns the list of (layer, tokens) of each call of a layer from now on."""
    calls, forward = [], Layer.forward

    def spy(self, stream, context, *keep):
        calls.append((self.index, stream.x.shape[1]))
        return forward(self, stream, context, *keep)

    monkeypatch.setattr(Layer, "forward", spy)
    return calls


def per_layer(twins, own: int, shared: int) -> list[tuple[int, int]]:
    """Returns (layer, tokens) of a pass, without layers that compute 0 tokens."""
    tokens = [own if x.kv_layer == i else shared for i, x in enumerate(twins.config.layers)]
    return [(i, t) for i, t in enumerate(tokens) if t]


@pytest.mark.parametrize(("keep", "shared"), [(0, 20), (1, 1), (3, 3), (50, 20)])
def test_shared_layers_compute_the_tokens_whose_logits_are_kept(twins, computed, keep, shared):
    twins.model(twins.prompt(2, 20), logits_to_keep=keep)
    assert computed == per_layer(twins, 20, shared)


def test_shared_layers_skip_all_chunks_of_a_prompt_but_the_last_token(twins, computed, monkeypatch):
    monkeypatch.setattr("gemma_fast.engine.decoder.PREFILL_CHUNK", 8)
    twins.model.generate(twins.prompt(1, 20), max_new_tokens=2, eos_token_id=[])
    passes = (8, 0), (8, 0), (4, 1), (1, 1)
    assert computed == [call for tokens in passes for call in per_layer(twins, *tokens)]


@pytest.mark.parametrize("keep", [1, 3], ids="keep {}".format)
@pytest.mark.parametrize("past", [0, 11], ids="past {}".format)
def test_kept_logits_equal_those_of_the_whole_prompt(twins, past, keep):
    """The rings wrap, rows have left padding, and a chunk may come before."""
    _, ids, mask = left_padded(twins, [30, 3, 17])
    expected = twins.hf(ids, attention_mask=mask).logits[:, -keep:]
    cache = None
    if past:
        out = twins.model(ids[:, :past], attention_mask=mask[:, :past], logits_to_keep=keep)
        cache = out.past_key_values
    found = twins.model(ids[:, past:], mask, past_key_values=cache, logits_to_keep=keep).logits
    close(found, expected)


def test_shared_layers_have_no_weights_and_no_cache_of_their_own(twins):
    cache = twins.model.new_cache(1, 16)
    own = [i for i, x in enumerate(twins.config.layers) if x.kv_layer == i]
    assert len(cache.keys) == len(cache.values) == len(own)
    for i, layer in enumerate(twins.model.layers):
        rows = twins.config.num_attention_heads * twins.config.layers[i].head_dim
        assert (layer.qkv_proj.shape[0] == rows) == (layer.k_norm is None) == (i not in own)


def test_own_layers_of_a_type_do_not_keep_rings_that_none_reads(twins):
    """Only the last layer of each type before the shared layers passes its rings on."""
    read = {x.kv_layer for i, x in enumerate(twins.config.layers) if x.kv_layer != i}
    assert {i for i, layer in enumerate(twins.model.layers) if layer.kv_is_read} == read
    assert read == {1, 2}
