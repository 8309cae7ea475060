"""Compares the model with transformers' eager model in fp32. Also compares chunks with one forward
pass, and padded batches with single prompts."""

import shutil
from copy import deepcopy

import pytest
import torch
from marks import RICHEST_FAMILIES
from tiny_models import CONFIGS, close, left_padded, random_model, rounding_error

from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.config import SLIDING
from gemma_fast.model import layer as layer_module
from gemma_fast.model.cache import KVCache


def lengths(twins) -> list[int]:
    window = twins.config.sliding_window or 8
    return [1, window - 1, window, window + 1, 2 * window + 3]


def test_logits_equal_transformers(twins):
    for t in lengths(twins):
        ids = twins.prompt(2, t)
        expected = twins.hf(ids).logits
        assert expected.std() > 0.3, "almost equal logits cannot show errors"
        close(twins.model(ids).logits, expected)
        close(twins.reference(ids).logits, expected)


def test_bfloat16_is_no_further_from_float32_than_transformers(twins):
    """Both compute with the same rounded weights. 2% is more than the errors' noise here."""
    ids, half = twins.prompt(8, 40), deepcopy(twins.hf).bfloat16()
    found = deepcopy(twins.model).bfloat16()(ids).logits.float()
    theirs = half(ids).logits.float()
    exact = half.float()(ids).logits
    experts = twins.config.num_experts > 0
    limit = 1.02 * rounding_error(theirs, exact, experts)
    assert rounding_error(found, exact, experts) <= limit


def test_left_padded_batch_equals_single_prompts(twins):
    prompts, ids, mask = left_padded(twins, lengths(twins))
    logits = twins.model(ids, attention_mask=mask).logits
    expected = twins.hf(ids, attention_mask=mask).logits
    reference = twins.reference(ids, attention_mask=mask).logits
    for row, prompt in enumerate(prompts):
        t = prompt.shape[1]
        close(logits[row, -t:], twins.model(prompt).logits[0])
        close(logits[row, -t:], expected[row, -t:])
        close(reference[row, -t:], expected[row, -t:])


def test_right_padded_batch_equals_single_prompts(twins):
    ids = twins.prompt(2, 9)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    logits = twins.model(ids, attention_mask=mask, use_cache=False).logits
    close(logits[0, :5], twins.model(ids[:1, :5]).logits[0])
    close(logits[1], twins.model(ids[1:]).logits[0])


@pytest.mark.parametrize("chunk", [1, 3, 8, 19], ids="chunk {}".format)
def test_chunks_equal_one_forward(twins, chunk):
    ids = twins.prompt(2, 40)
    expected = twins.model(ids).logits
    cache, rows = None, []
    for part in ids.split(chunk, dim=1):
        out = twins.model(part, past_key_values=cache)
        cache = out.past_key_values
        rows.append(out.logits)
    close(torch.cat(rows, dim=1), expected)


@pytest.mark.parametrize("chunk", [1, 4, 11], ids="chunk {}".format)
def test_left_padded_chunks_and_steps_equal_single_prompts(twins, chunk):
    prompts, ids, mask = left_padded(twins, [30, 3, 17])
    cache = KVCache(twins.config, 3, 30, dtype=torch.float32)
    for end in range(chunk, 30 + chunk, chunk):
        columns = slice(end - chunk, min(end, 30))
        logits = twins.model(
            ids[:, columns], attention_mask=mask[:, : min(end, 30)], past_key_values=cache
        ).logits
    for row, prompt in enumerate(prompts):
        close(logits[row, -1], twins.model(prompt).logits[0, -1])


def test_reference_with_a_cache_equals_one_forward(twins):
    _, ids, mask = left_padded(twins, [21, 12])
    expected = twins.reference(ids, attention_mask=mask).logits
    past, rows = None, []
    for end in (9, 10, 21):
        begin = past[0][0].shape[2] if past else 0
        out = twins.reference(ids[:, begin:end], mask[:, :end], past_key_values=past)
        past = out.past_key_values
        rows.append(out.logits)
    close(torch.cat(rows, dim=1)[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("twins", ["gemma-mqa", "gemma3-gqa"], indirect=True)
@pytest.mark.parametrize(("keep", "tokens"), [(0, 20), (1, 1), (3, 3), (50, 20)])
def test_the_last_layer_computes_the_kept_tokens(twins, keep, tokens, monkeypatch):
    """After its keys and values. Each layer calls `linear` for o_proj and down_proj."""
    found, real = [], layer_module.linear
    monkeypatch.setattr(
        layer_module,
        "linear",
        lambda x, *args, **kw: (found.append(x.shape[1]), real(x, *args, **kw))[1],
    )
    twins.model(twins.prompt(2, 20), logits_to_keep=keep)
    assert found == 2 * (twins.config.num_hidden_layers - 1) * [20] + 2 * [tokens]


def test_logits_to_keep_and_use_cache_are_respected(twins):
    ids = twins.prompt(2, 6)
    for model in (twins.model, twins.reference):
        out = model(ids, logits_to_keep=1, use_cache=False)
        assert out.past_key_values is None
        close(out.logits, twins.model(ids).logits[:, -1:])


def test_windowed_layers_keep_only_their_window(twins):
    window = twins.config.sliding_window
    if window is None:
        pytest.skip("no windowed layers")
    cache = KVCache(twins.config, 1, 200, dtype=torch.float32)
    slots = {twins.config.window(i): ring.shape[2] for i, ring in enumerate(cache.keys)}
    assert slots == {window: window, None: 256}
    values = 0
    for i, layer in enumerate(twins.config.layers):
        positions = window if layer.kind == SLIDING else 256
        if layer.kv_layer == i:
            values += positions * layer.num_key_value_heads * layer.head_dim
    assert cache.nbytes == 2 * values * 4
    assert cache.nbytes == KVCache.bytes_needed(twins.config, 1, 200, torch.float32)


def test_rings_are_as_long_as_whole_blocks_or_the_window(twins):
    """With descriptors, the attention kernel copies whole blocks of keys."""
    for past, tokens, full, windowed in (
        (0, 5, 128, None), (3, 5, 128, None), (0, 128, 128, 128), (0, 129, 256, 256),
        (100, 20, 128, 128), (120, 2, 128, 128), (127, 2, 256, 128),
    ):  # fmt: skip
        cache = KVCache(twins.config, 1, 200, dtype=torch.float32)
        cache.advance(past)
        for layer in range(len(cache.keys)):
            slots = cache.rings(layer, tokens)[0].shape[2]
            window = twins.config.window(layer)
            assert slots == (windowed or window if window else full)


def test_a_full_cache_that_grows_doubles_its_length(twins):
    cache = twins.model(twins.prompt(1, 20)).past_key_values
    twins.model(twins.prompt(1, 1), past_key_values=cache)
    assert cache.max_length == 40


def test_generation_config_is_read(twins, tmp_path):
    shutil.copytree(twins.path, tmp_path / "copy")
    (tmp_path / "copy" / "generation_config.json").write_text('{"top_k": 3}')
    model = GemmaForCausalLM.from_pretrained(tmp_path / "copy", device="cpu")
    assert model.generation_config == {"top_k": 3}


@RICHEST_FAMILIES
def test_model_on_kernels_equals_reference(twins, device):
    """In fp32, the model with kernels gives the logits and greedy tokens of the reference."""
    model = deepcopy(twins.model).to(device)
    _, ids, mask = left_padded(twins, [19, 5])
    expected = twins.reference(ids, attention_mask=mask).logits
    logits = model(ids, attention_mask=mask).logits.cpu()
    close(logits[mask.bool()], expected[mask.bool()])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=4, eos_token_id=[]).cpu()
    for _ in range(4):
        token = twins.reference(ids, attention_mask=mask).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat((ids, token), dim=1)
        mask = torch.cat((mask, torch.ones_like(token)), dim=1)
    assert torch.equal(out, ids)


def test_random_weights_depend_on_the_seed():
    models = [random_model(CONFIGS["gemma3-mqa"], seed=seed) for seed in (0, 0, 1)]
    logits = [model(torch.tensor([[2, 5, 9]])).logits for model in models]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])
    assert models[0].embed_tokens.std() == pytest.approx(0.02, rel=0.02)


def test_random_weights_in_bf16_are_the_rounded_fp32_weights():
    exact = random_model(CONFIGS["gemma-mqa"])
    rounded = random_model(CONFIGS["gemma-mqa"], torch.bfloat16)
    for name, weight in exact.named_parameters():
        assert torch.equal(weight.bfloat16(), rounded.get_parameter(name)), name
