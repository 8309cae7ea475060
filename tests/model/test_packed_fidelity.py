"""Compares Gemma 3 270M (real weights, Q4_K_M) on a CPU, packed and unpacked, in float32 and bf16,
on the three texts of `gemma-fast verify`. The packed model must be as good as bfloat16 alone."""

import math

import pytest
import torch
from demo_answers import CONTINUATION, PROMPT

from gemma_fast.benchmarks.verify.ids import TEXTS, read_text
from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.kernels.packed import PackedWeight
from gemma_fast.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow
TOKENS = 192


@pytest.fixture(scope="module")
def texts(demo_gguf) -> dict[str, torch.Tensor]:
    tokenizer = Tokenizer.from_pretrained(demo_gguf)
    ids = {name: tokenizer(read_text(name), return_tensors="pt").input_ids for name in TEXTS}
    return {name: x[:, :TOKENS] for name, x in ids.items()}


@pytest.fixture(scope="module")
def logits_of(demo_gguf, texts):
    """Returns a function that returns a model's logits of each text."""

    def run(dtype: str, quantize: str | None) -> dict[str, torch.Tensor]:
        model = GemmaForCausalLM.from_pretrained(
            demo_gguf, dtype=dtype, device="cpu", quantize=quantize
        )
        assert isinstance(model.embed_tokens, PackedWeight) == (quantize is None)
        return {name: model(ids).logits[0].float() for name, ids in texts.items()}

    return run


@pytest.fixture(scope="module")
def exact(logits_of):
    return logits_of("float32", "none")


def perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    return math.exp(torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]))


def test_packed_bf16_is_as_good_as_bf16(logits_of, exact, texts):
    packed, unpacked = logits_of("bfloat16", None), logits_of("bfloat16", "none")
    for name, ids in texts.items():
        expected = perplexity(exact[name], ids)
        assert perplexity(packed[name], ids) == pytest.approx(expected, rel=0.01)
        in_bf16 = (unpacked[name] - exact[name]).abs().mean()
        difference = (packed[name] - exact[name]).abs().mean()
        assert 1e-3 < difference <= 2 * in_bf16


def test_packed_float32_equals_unpacked_float32(logits_of, exact, texts):
    packed = logits_of("float32", None)
    for name in texts:
        assert (packed[name] - exact[name]).abs().max() < 2e-3


def test_greedy_text_of_packed_float32_is_unchanged(demo_gguf):
    tokenizer = Tokenizer.from_pretrained(demo_gguf)
    model = GemmaForCausalLM.from_pretrained(demo_gguf, dtype="float32", device="cpu")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=30)
    assert tokenizer.decode(out[0, ids.shape[1] :]) == CONTINUATION
