"""Tests KVCache: views of rows, token counts, interrupted passes and shared rotary tables."""

import pytest
import torch
from tiny_models import CONFIGS, close, random_model

from gemma_fast.model.cache import KVCache


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIGS["gemma3-gqa"])


def read(model, ids, cache):
    """Adds ids :: [b, t] to the cache. Returns the logits after the last token: [b, vocab]."""
    cache.reserve(ids.shape[1])
    return model.logits(model.hidden_states(ids, cache).last(1))[:, 0]


@torch.no_grad()
def test_sequences_that_start_at_different_times_decode_together(model):
    """Row 1 starts when row 2 already has 9 tokens. Row 0 is never used."""
    cache = model.new_cache(3, 64)
    first, second = torch.arange(3, 12).unsqueeze(0), torch.arange(40, 64).unsqueeze(0)
    read(model, first, cache.rows(2))
    assert (cache.rows(2).length, cache.rows(1).length, cache.length) == (9, 0, 9)
    read(model, second, cache.rows(slice(1, 2)))
    assert cache.length == 24 and cache.next_position.tolist() == [0, 24, 9]
    token = torch.tensor([[5], [6], [7]])
    both = read(model, token, cache)
    assert cache.next_position.tolist() == [1, 25, 10]
    for row, ids in ((1, second), (2, first)):
        whole = torch.cat((ids, token[row : row + 1]), dim=1)
        expected = model(whole, logits_to_keep=1).logits[0, 0]
        close(both[row], expected)


@torch.no_grad()
def test_clearing_a_row_leaves_other_rows_unchanged(model):
    cache = model.new_cache(2, 32)
    ids = torch.arange(3, 17).view(2, 7)
    read(model, ids, cache)
    cache.rows(0).clear()
    assert (cache.rows(0).length, cache.rows(1).length) == (0, 7)
    assert not cache.keys[0][0].any() and cache.keys[0][1].any()
    read(model, ids[:1, :3], cache.rows(0))
    assert cache.next_position.tolist() == [3, 7]


def test_count_changes_lengths_but_not_positions(model):
    cache = model.new_cache(2, 32)
    cache.advance(5)
    cache.rows(1).count(2)
    assert (cache.rows(0).length, cache.length) == (5, 7)
    assert cache.next_position.tolist() == [5, 5]


def test_a_failed_pass_leaves_its_rows_stale(model):
    cache = model.new_cache(2, 32)
    with (
        pytest.raises(KeyboardInterrupt),
        cache.rows(1).unfinished("the first reason"),
        cache.rows(1).unfinished("a reason within"),
    ):
        raise KeyboardInterrupt
    assert cache.stale == cache.rows(1).stale == "the first reason"
    assert cache.rows(0).stale is None
    cache.rows(0).reserve(3)
    with pytest.raises(ValueError, match="cannot be continued: the first reason; start with a new"):
        cache.reserve(3)
    cache.rows(1).clear()
    assert cache.stale is None


def test_selecting_rows_of_a_growing_cache_raises(model):
    with pytest.raises(AssertionError, match="a cache that grows"):
        KVCache(model.config, 2, 32, dtype=torch.float32, grows=True).rows(0)


def test_caches_of_a_model_share_its_rotary_tables(model):
    first, second = model.new_cache(1, 64), model.new_cache(2, 40)
    for kind, tables in first.angles.items():
        assert all(x is y for x, y in zip(tables, second.angles[kind], strict=True))
    longer = model.new_cache(1, 100)
    for kind, (cos, _) in longer.angles.items():
        assert len(cos) == 100
        assert torch.equal(cos[:64], first.angles[kind][0])


@torch.no_grad()
def test_a_paused_row_stays_as_it_is_while_others_decode(model):
    """Row 0 pauses after 20 tokens, which is past its window; row 2 was never used."""
    cache, ids = model.new_cache(3, 64), torch.arange(3, 43).view(2, 20)
    read(model, ids, cache.rows(slice(0, 2)))
    cache.rows(2).pause()
    cache.rows(0).pause()
    before = [x[0].clone() for x in (*cache.keys, *cache.values)]
    for _ in range(3):
        read(model, torch.tensor([[5], [6], [7]]), cache)
    assert [cache.rows(i).length for i in range(3)] == [20, 23, 0]
    assert all(map(torch.equal, before, [x[0] for x in (*cache.keys, *cache.values)]))
    assert not any(x[2].any() for x in (*cache.keys, *cache.values))
    cache.rows(0).resume()
    token = torch.tensor([[9]])
    expected = model(torch.cat((ids[:1], token), dim=1), logits_to_keep=1).logits[0, 0]
    close(read(model, token, cache.rows(0))[0], expected)


def test_a_failed_pass_does_not_make_paused_rows_stale(model):
    cache = model.new_cache(2, 32)
    cache.rows(1).pause()
    with pytest.raises(KeyboardInterrupt), cache.unfinished("a reason"):
        raise KeyboardInterrupt
    assert (cache.rows(0).stale, cache.rows(1).stale) == ("a reason", None)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [5, 40])
def test_a_copied_row_continues_like_its_source(model, tokens):
    cache, ids, token = model.new_cache(3, 64), torch.arange(3, 43)[None, :tokens], torch.ones(1, 1)
    read(model, torch.arange(50, 90).view(1, 40), cache.rows(2))  # to be replaced
    read(model, ids, cache.rows(0))
    cache.rows(2).copy_from(cache.rows(0))
    assert [cache.rows(i).length for i in range(3)] == [tokens, 0, tokens]
    found = [read(model, token.long(), cache.rows(i)) for i in (0, 2)]
    assert torch.equal(*found)
