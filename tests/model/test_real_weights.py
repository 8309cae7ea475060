"""Compares Gemma 3 270M (real weights, packed) with transformers in fp32, and with the unpacked
weights. Faster tests of these weights are in tests/package/test_cli.py."""

import pytest
import torch
from demo_answers import CONTINUATION, PROMPT, TOP_TEN
from tolerances import logits_error

from gemma_fast.benchmarks.model.transformers_model import transformers_model
from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.checkpoint.open import open_checkpoint
from gemma_fast.kernels.packed import PackedWeight
from gemma_fast.text.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*packed weights are unpacked again"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=DEVICES)
def model(demo_gguf, request):
    return GemmaForCausalLM.from_pretrained(demo_gguf, dtype="float32", device=request.param)


@pytest.fixture(scope="module")
def tokenizer(demo_gguf):
    return Tokenizer.from_pretrained(demo_gguf)


@pytest.fixture(scope="module")
def long_prompt(tokenizer):
    """Returns 700 tokens of text, more than the window of 512: [1, 700]."""
    words = "The memory of a processor is where its time goes, so count the bytes before the work. "
    ids = tokenizer(" ".join(f"{i}. {words}" for i in range(60)), return_tensors="pt").input_ids
    return ids[:, :700]


@pytest.fixture(scope="module")
def expected(demo_gguf, long_prompt):
    """Returns transformers' fp32 logits for the long prompt's last 64 tokens: [1, 64, vocab]."""
    hf = transformers_model(open_checkpoint(demo_gguf), "eager", torch.float32, "cpu")
    return hf(long_prompt, logits_to_keep=64).logits


def test_top_ten_tokens_equal_transformers(model, tokenizer):
    logits = model(tokenizer(PROMPT, return_tensors="pt").input_ids).logits[0, -1]
    error = logits_error(model.config, tokens=5) * float(logits.std())
    assert logits.max() == pytest.approx(17.9338, abs=error)
    best = logits.softmax(-1).topk(10)
    assert [tokenizer.decode(i) for i in best.indices.tolist()] == list(TOP_TEN)
    assert best.values.tolist() == pytest.approx(list(TOP_TEN.values()), abs=error / 4)


def test_greedy_text_equals_transformers(model, tokenizer):
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=30)
    assert tokenizer.decode(out[0, ids.shape[1] :]) == CONTINUATION


def check(logits, expected, config):
    """Known mistakes change logits by 0.018 or more, three times the limit."""
    limit = logits_error(config, tokens=config.sliding_window) * expected.square().mean().sqrt()
    assert (logits.cpu() - expected).abs().max() < limit


def test_logits_past_the_window_equal_transformers(model, long_prompt, expected):
    check(model(long_prompt, logits_to_keep=64).logits, expected, model.config)


def test_chunks_past_the_window_equal_transformers(model, long_prompt, expected):
    cache = None
    for chunk in long_prompt.split((300, 336, 64), dim=1):
        out = model(chunk, past_key_values=cache)
        cache = out.past_key_values
    check(out.logits, expected, model.config)


def test_packed_weights_compute_what_unpacked_ones_do(demo_gguf, model, tokenizer, long_prompt):
    unpacked = GemmaForCausalLM.from_pretrained(
        demo_gguf, dtype="float32", device=model.device, quantize="none"
    )
    assert isinstance(model.embed_tokens, PackedWeight)
    assert isinstance(unpacked.embed_tokens, torch.Tensor)
    assert model.memory()["weights"] < 0.3 * unpacked.memory()["weights"]
    logits, exact = (x(long_prompt, logits_to_keep=64).logits for x in (model, unpacked))
    check(logits, exact.cpu(), model.config)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    assert torch.equal(*(x.generate(ids, max_new_tokens=30) for x in (model, unpacked)))


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_stays_close_to_fp32(demo_gguf, device, long_prompt, expected):
    half = GemmaForCausalLM.from_pretrained(demo_gguf, dtype="bfloat16", device=device)
    difference = (half(long_prompt, logits_to_keep=64).logits.float().cpu() - expected).abs()
    assert difference.mean() < 0.1
    assert difference.mean() > 1e-3, "too close to fp32: the model did not run in bf16"
