"""Tests the predicted times of docs/benchmarks.md."""

from pathlib import Path

import pytest

from gemma_fast.benchmarks.model import predict
from gemma_fast.presets import PRESETS

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def test_prediction_equals_numbers_computed_by_hand():
    """Gemma 2B: 5.01 GB of weights, and 18,432 bytes of K and V per token. E2B: 2,279,759,139
    weights, a row of 8,960 per-layer embeddings, and K and V of 28 windows and 7 full layers."""
    gemma = 5_012_344_832 + 1024 * 18_432
    assert predict.step_seconds(PRESETS["gemma-2b"], 1024) == pytest.approx(
        gemma / 3e12 + (5 * 18 + 3) * 1.3e-6
    )
    e2b = 2 * (2_279_759_139 + 8960 + 28 * 512 * 2 * 256 + 7 * 8192 * 2 * 512)
    assert predict.step_seconds(PRESETS["gemma-4-e2b"], 8192) == pytest.approx(
        e2b / 3e12 + (7 * 35 + 5) * 1.3e-6
    )
    assert predict.launches(PRESETS["gemma-4-31b"]) == 303


@pytest.mark.parametrize("name", ["gemma-2b", "gemma-4-e4b"])
def test_packed_weights_read_about_a_half_and_a_quarter_of_the_bytes(name):
    """int8 has a scale of 2 bytes for 128 weights, int4 for 32."""
    config = PRESETS[name]
    size = predict.step_bytes(config, 1)
    for bits, share in ((8, (1 + 2 / 128) / 2), (4, (0.5 + 2 / 32) / 2)):
        packed = predict.step_bytes(config, 1, predict.sizes_of(config, bits))
        assert packed / size == pytest.approx(share, rel=2e-3)
        assert packed / size < {8: 0.54, 4: 0.32}[bits]


def test_prediction_of_a_mixture_of_experts_equals_numbers_computed_by_hand():
    """A token of 26B-A4B chooses 8 of 128 experts. A layer with a window has 16 heads for queries,
    8 for keys and 8 for values, of 256 channels."""
    config, hidden = PRESETS["gemma-4-26b-a4b"], 2816
    assert predict.launches(config) == 7 * 30 + 3
    experts = 2 * 8 * 3 * 704 * hidden
    assert experts == 95_158_272
    attention = 2 * (hidden * 256 * (16 + 8 + 8 + 16) + 2 * 256)
    dense = 2 * (3 * 2112 * hidden + 128 * hidden + hidden + 128 + 7 * hidden + 1)
    for rows, number in ((1, 8), (8, 64)):
        cached = rows * 2 * 8 * 256 * 1024 * 2
        found = predict.layer_bytes(config, 0, rows, number)
        assert found == {
            "attention": attention + cached, "MLP and router": dense,
            "experts": experts * number // 8,
        }  # fmt: skip


def test_tables_in_the_docs_are_the_predictions():
    docs = DOCS.read_text(encoding="utf-8")
    assert predict.prediction() in docs and predict.layer_prediction() in docs
