"""Checks that `generate` gives the same tokens before and after acceleration, with every cache and
every decoding strategy."""

import copy

import pytest
import torch
from hf_models import FAMILIES, NEW, RENAMED, VERSION, T, generate, logits, make, padded, prompt
from marks import slow
from tiny_models import close
from transformers import DynamicCache, StaticCache
from triton_interpreter import interpreter

from gemma_fast.hf import GemmaFastCache, accelerate, restore

NEWER = VERSION >= (5, 18)


@pytest.fixture(params=FAMILIES)
def model(request):
    return make(request.param)


WAYS = {
    "dynamic cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "beams over a static cache": {"num_beams": 3, "cache_implementation": "static"},
    "sampling": {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
    "prefill in chunks": {"prefill_chunk_size": 7},
}


@pytest.mark.parametrize("way", WAYS)
def test_generate_gives_the_same_tokens_as_transformers(model, way):
    ids = prompt()
    expected = generate(model, ids, padded(ids, 7, 0), **WAYS[way])
    accelerate(model, strict=True)
    assert torch.equal(generate(model, ids, padded(ids, 7, 0), **WAYS[way]), expected)


@pytest.mark.parametrize(
    "way", ["dynamic cache", "rings", *slow("static cache", "beams", "prefill in chunks")]
)
def test_generate_on_the_triton_kernels_gives_the_same_tokens_as_transformers(way):
    """Tests several caches, because their layouts of keys differ. Runs in Triton's interpreter or
    on a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, ids = make("gemma3-gqa", layers=2).to(device), prompt(t=15).to(device)
    mask, options = padded(ids.cpu(), 4, 0).to(device), WAYS.get(way, {}) | {"max_new_tokens": 4}
    expected = generate(model, ids, mask, **options)
    accelerate(model, strict=True)
    if way == "rings":
        options["past_key_values"] = GemmaFastCache(model.config, 19)
    with interpreter():
        assert torch.equal(generate(model, ids, mask, **options), expected)


@pytest.mark.parametrize("way", ["assisted", "prompt lookup"])
def test_assisted_and_prompt_lookup_decoding_give_the_same_tokens(model, way):
    """The model checks several candidate tokens in one step, and removes the rejected tokens from
    the cache."""
    if way == "assisted" and model.config.model_type != "gemma" and not NEWER:
        pytest.skip("assisted decoding fails in transformers 5.17 itself")
    assistant = copy.deepcopy(model)
    for weight in assistant.parameters():  # so that some candidates are wrong
        weight.data += 0.02 * torch.randn_like(weight)
    options = {"assistant_model": assistant} if way == "assisted" else {}
    if way == "prompt lookup":
        options["prompt_lookup_num_tokens"] = 3
    ids = prompt(b=1, t=15).repeat(1, 2)
    expected = generate(model, ids, **options)
    accelerate(model, strict=True)
    accelerate(assistant, strict=True)
    assert torch.equal(generate(model, ids, **options), expected)


@pytest.mark.parametrize(
    "length", [T, 3], ids=["longer than the window", "shorter than the window"]
)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_rings_give_the_same_tokens_as_transformers(model, options, length):
    ids = prompt(t=length)
    mask = padded(ids, 2, 0)
    expected = generate(model, ids, mask, **options)
    accelerate(model, strict=True)
    cache = GemmaFastCache(model.config, T + NEW)
    assert torch.equal(generate(model, ids, mask, past_key_values=cache, **options), expected)
    if not options:
        cache.reset()
        assert torch.equal(generate(model, ids, mask, past_key_values=cache), expected)


@pytest.mark.skipif(not RENAMED, reason="past_key_values was called so before transformers 5.24")
@pytest.mark.parametrize("kind", ["rings", "dynamic"])
def test_cache_can_be_passed_under_its_new_name(model, kind):
    ids = prompt()
    expected, text = logits(model, ids), generate(model, ids)
    accelerate(model, strict=True)

    def cache():
        rings = GemmaFastCache(model.config, T + NEW)
        return rings if kind == "rings" else DynamicCache(config=model.config)

    kept = cache()
    with torch.no_grad():
        out = model(ids[:, :20], cache=kept)
    assert out.cache is kept
    found = torch.cat((out.logits, logits(model, ids[:, 20:], cache=out.cache)), dim=1)
    close(found, expected)
    assert torch.equal(generate(model, ids, cache=cache()), text)


@pytest.mark.parametrize("chunk", [1, 5, 11, 13, 20])
def test_prompt_in_chunks_gives_the_same_logits_as_transformers(chunk):
    """The text is several windows long, and is read in chunks of `chunk` tokens."""
    model, ids = make("gemma3-gqa"), prompt(t=60)
    mask = padded(ids, 17, 0)
    expected = logits(model, ids, mask)
    accelerate(model, strict=True)
    for cache in (GemmaFastCache(model.config, 60), DynamicCache(config=model.config)):
        found = torch.cat([
            logits(model, ids[:, i : i + chunk], mask[:, : i + chunk], past_key_values=cache)
            for i in range(0, 60, chunk)
        ], dim=1)  # fmt: skip
        real = mask.bool()
        close(found[real], expected[real])


def test_decode_step_writes_one_slot_of_a_ring():
    """In contrast, transformers' StaticSlidingWindowLayer shifts all its keys once it is full."""
    model, ids = accelerate(make("gemma3-gqa"), strict=True), prompt(t=T)
    cache = GemmaFastCache(model.config, 60)
    logits(model, ids, past_key_values=cache)
    ring = next(layer for layer in cache.layers if layer.is_sliding)
    before, where = ring.keys.clone(), ring.keys.data_ptr()
    logits(model, ids[:, :1], past_key_values=cache)
    changed = (ring.keys != before).any(dim=3).any(dim=1).any(dim=0)
    assert changed.nonzero().tolist() == [[T % model.config.sliding_window]]
    assert ring.keys.shape[2] == model.config.sliding_window and ring.keys.data_ptr() == where


def test_static_caches_of_two_lengths_give_the_same_tokens_as_transformers(model):
    for room in (T + NEW, 200):
        ids = prompt(t=5)
        restore(model)
        expected = generate(model, ids, past_key_values=StaticCache(model.config, room))
        accelerate(model, strict=True)
        for cache in (StaticCache, GemmaFastCache):
            found = generate(model, ids, past_key_values=cache(model.config, room))
            assert torch.equal(found, expected)


def test_left_padded_batch_gives_the_same_results_as_single_prompts(model):
    accelerate(model, strict=True)
    ids = prompt(b=3)
    mask = padded(ids, 0, 4, 21)
    together = logits(model, ids, mask)
    texts = generate(model, ids, mask)
    for row, padding in enumerate((0, 4, 21)):
        alone = ids[row : row + 1, padding:]
        close(logits(model, alone)[0], together[row, padding:])
        assert torch.equal(generate(model, alone)[0, T - padding :], texts[row, T:])
