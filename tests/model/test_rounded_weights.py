"""Compares the real Gemma 3 270M, rounded to 8 and 4 bits, with the same weights in 16 bits."""

import math

import pytest
import torch

from gemma_fast.benchmarks.verify import cost
from gemma_fast.benchmarks.verify.model import closeness
from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.checkpoint import rounded
from gemma_fast.checkpoint.base import Checkpoint
from gemma_fast.checkpoint.open import open_checkpoint

pytestmark = pytest.mark.slow


class SixteenBits(Checkpoint):
    """The demo's weights unpacked to bfloat16: a checkpoint without packed weights."""

    def __init__(self, path):
        self.inner = inner = open_checkpoint(path)
        self.config, self.path, self.shapes = inner.config, inner.path, inner.shapes
        self.generation_config = {}

    def rows(self, name, start, stop, device="cpu"):
        return self.inner.rows(name, start, stop, device).bfloat16()

    def _read(self, name, out):
        self.inner.copy(name, out)
        out.copy_(out.bfloat16())


@pytest.fixture(scope="module")
def checkpoint(demo_gguf):
    return SixteenBits(demo_gguf)


@pytest.fixture(scope="module")
def texts(checkpoint):
    return cost.passages(checkpoint, torch.device("cpu"))


def logits(checkpoint, texts):
    """Returns the logits of each text, computed in float32 with the checkpoint's values."""
    model = GemmaForCausalLM.from_checkpoint(
        checkpoint, dtype="float32", device="cpu", quantize="none"
    )
    return {name: model(ids, use_cache=False).logits[0] for name, ids in texts.items()}


@pytest.fixture(scope="module")
def truth(checkpoint, texts):
    return logits(checkpoint, texts)


def figures(quantize, checkpoint, texts, truth):
    """Returns the change of perplexity over all texts, KL mean and |Δ logit| mean of each text."""
    found = logits(rounded.with_quantize(checkpoint, quantize), texts)
    close = {name: closeness(found[name], truth[name], ids[0]) for name, ids in texts.items()}
    for name, x in close.items():
        print(f"{quantize}, {name}: KL {x[0]:.4f}, |Δ| {x[2]:.4f}, top-1 {x[4]:.3f}, {x[5]:+.2%}")
    return close


def overall(close):
    return math.exp(sum(math.log1p(x[5]) for x in close.values()) / len(close)) - 1


def test_int8_changes_perplexity_by_less_than_a_percent(checkpoint, texts, truth):
    close = figures("int8", checkpoint, texts, truth)
    assert all(abs(x[5]) < 0.01 for x in close.values())


def test_int4_is_better_than_plain_rounding(checkpoint, texts, truth, monkeypatch):
    ours = figures("int4", checkpoint, texts, truth)
    monkeypatch.setattr(rounded, "_search", lambda x, peak: peak.abs() / 7)
    monkeypatch.setattr(rounded, "_fit", lambda x, q: (x.abs().amax(-1, keepdim=True) / 7, None))
    plain = figures("int4", checkpoint, texts, truth)
    print(f"int4 {overall(ours):+.2%}, plain rounding {overall(plain):+.2%}")
    assert overall(ours) < overall(plain)
    assert all(ours[name][0] < plain[name][0] for name in texts)
