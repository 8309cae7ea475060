"""Compares the figures of a walk-through of Gemma 3 270M (real weights) with stored ones.

The stored figures are those of transformers' modules in float32, with the weights and the ids that
benchmarks/verify/ reads from the GGUF file by llama.cpp's rules, without gemma_fast's reader and
tokenizer. A slow test computes them again.
"""

import math

import pytest
import torch
from demo_answers import PROMPT, TOP_TEN
from transformers_trace import trace, without_norms

from gemma_fast.benchmarks.verify.truth import truth_of
from gemma_fast.checkpoint.open import open_checkpoint
from gemma_fast.reference import Reference
from gemma_fast.text.tokenizer import Tokenizer
from gemma_fast.walkthrough.data import WORDS, collect, encode

LAYERS = 18
UPDATES = {
    "attention": [
        0.97695, 0.56656, 0.13238, 0.22762, 0.11519, 0.2597, 0.015306, 0.038481, 0.016997, 0.012598,
        0.047278, 0.035506, 0.045402, 0.078659, 0.049889, 0.037209, 0.051329, 0.025425,
    ],
    "mlp": [
        0.99551, 0.31021, 0.15937, 0.81011, 0.68459, 0.43932, 0.2881, 0.23857, 0.21181, 0.061593,
        0.069639, 0.099101, 0.071166, 0.063647, 0.067529, 0.072725, 0.20075, 0.20853,
    ],
}  # fmt: skip
BEFORE_FINAL_NORM = [2658.5, 1139.9, 1201.1, 1377.9, 1369.1]  # RMS of each token
WITHOUT_NORMS = [
    1.0314, 1.2929, 1.5222, 2.2966, 2.6824, 3.7477, 6.8112, 7.8168, 34.181, 42.005, 985.73, 1403.3,
    1.4683e6, 1.8599e6, 2.3432e12, 2.7019e12, 4.8341e24,
]  # fmt: skip
TOKENS = ["<bos>", "I", "▁want", "▁to", "▁move"]
# After each token but the last one, whose likeliest tokens are demo_answers.TOP_TEN.
LIKELIEST = [
    {
        "<h1>": 0.0828, "<strong>": 0.0709, "<start_of_image>": 0.0602, "<h2>": 0.0534,
        "The": 0.0530, "import": 0.0381, "package": 0.0371, "<": 0.0344, "<b>": 0.0310, "I": 0.0263,
    },
    {
        "▁have": 0.1524, "'": 0.1329, "▁am": 0.0895, "▁was": 0.0617, "’": 0.0536,
        "▁had": 0.0391, "▁love": 0.0292, "▁think": 0.0250, "▁don": 0.0204, "▁recently": 0.0200,
    },
    {
        "▁to": 0.9052, "▁you": 0.0198, "▁a": 0.0153, "▁the": 0.0146, "▁this": 0.0082,
        "▁my": 0.0070, "▁it": 0.0041, "▁": 0.0023, "▁your": 0.0023, "▁that": 0.0013,
    },
    {
        "▁use": 0.0578, "▁start": 0.0515, "▁know": 0.0437, "▁be": 0.0388, "▁make": 0.0364,
        "▁ask": 0.0335, "▁create": 0.0326, "▁share": 0.0321, "▁thank": 0.0317, "▁show": 0.0310,
    },
    {token.replace(" ", "▁"): p for token, p in TOP_TEN.items()},
]  # fmt: skip


@pytest.fixture(scope="module")
def data(demo_gguf):
    tokenizer = Tokenizer.from_pretrained(demo_gguf)
    reference = Reference.from_pretrained(demo_gguf, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gemma_fast.walkthrough.cost.REPEATS", 1)  # no test here looks at the time
        return collect(reference, tokenizer, encode(tokenizer, PROMPT, reference.config))


def test_ten_likeliest_tokens_after_each_token(data):
    assert [x["token"] for x in data["predictions"]] == data["tokens"]["names"] == TOKENS
    for found, expected in zip(data["predictions"], LIKELIEST, strict=True):
        assert [x["token"] for x in found["next"]] == [*expected]
        assert [x["probability"] for x in found["next"]] == pytest.approx(
            [*expected.values()], abs=5e-4
        )


def test_update_scales(data):
    for name, expected in UPDATES.items():
        assert data["updates"][name] == pytest.approx(expected, rel=1e-3)
    attention = data["updates"]["attention"]
    assert attention.index(max(attention)) == 0


def test_similarity_of_the_default_words(data):
    """Colors are more alike than a color and a city."""
    found = data["similarity"]
    assert found["names"] == [*(f"▁{word}" for word in WORDS), "I", "▁want", "▁to", "▁move"]
    assert found["left_out"] == {}
    yellow = dict(zip(found["names"], found["cosines"][0], strict=True))
    assert yellow["▁yellow"] == pytest.approx(1)
    assert yellow["▁orange"] > yellow["▁Berlin"] + 0.1


def test_rms_before_the_final_norm(data):
    assert data["final_norm"]["before"] == pytest.approx(BEFORE_FINAL_NORM, rel=1e-3)


def test_stream_without_norms_overflows(data):
    """float32 has numbers up to 3.4e38. The stream stays finite for eight layers."""
    found = data["hiddens"]["without_norms"]
    finite = [x for x in found if x is not None]
    assert finite == pytest.approx(WITHOUT_NORMS, rel=1e-3)
    assert found[len(finite) :] == [None] * (2 * LAYERS + 1 - len(finite))
    assert None not in data["hiddens"]["with_norms"]


@pytest.mark.slow
def test_stored_figures_are_those_of_transformers(demo_gguf):
    truth, hf = truth_of(open_checkpoint(demo_gguf), torch.device("cpu"))
    assert truth.name.startswith("transformers")
    assert "llama.cpp's rules" in truth.reader
    assert truth.ids is not None
    ids = torch.tensor([truth.ids(PROMPT)])
    found, bare = trace(hf, ids), trace(without_norms(hf), ids)
    stream, updates = found.stream(LAYERS), {"attention": [], "mlp": []}
    for i in range(LAYERS):
        for skip, (name, update) in zip(stream[2 * i :], found.updates(i).items(), strict=False):
            x, y = float(update.std()), float(skip.std())
            updates[name].append(x / math.hypot(x, y))
    for name, expected in UPDATES.items():
        assert updates[name] == pytest.approx(expected, rel=1e-4)
    rms = found.inputs["model.norm"][0].square().mean(-1).sqrt()
    assert rms.tolist() == pytest.approx(BEFORE_FINAL_NORM, rel=1e-4)
    scales = [float(x.double().std()) for x in bare.stream(LAYERS)]
    assert [x for x in scales if math.isfinite(x)] == pytest.approx(WITHOUT_NORMS, rel=1e-4)
    best = found.logits.softmax(-1).topk(10).values
    for row, expected in zip(best.tolist(), LIKELIEST, strict=True):
        assert row == pytest.approx([*expected.values()], abs=1e-4)
