"""Compares the small examples of a walk-through with closed formulas."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_models import CONFIGS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gemma_fast.benchmarks.model.transformers_model import transformers_config
from gemma_fast.config import FULL, RopeParameters
from gemma_fast.presets import PRESETS
from gemma_fast.walkthrough.data import rounded, visible
from gemma_fast.walkthrough.example import mlp_example, rotations, wavelengths
from gemma_fast.walkthrough.record import flatness


def formula(theta: float, d: int, factor: float = 1.0) -> list[float]:
    """Returns the wavelengths 2π * theta^(2i / d) * factor of the channel pairs."""
    return [2 * math.pi * theta ** (2 * i / d) * factor for i in range(d // 2)]


@pytest.mark.parametrize("name", list(PRESETS))
def test_wavelengths_of_the_published_sizes(name):
    config = PRESETS[name]
    found = wavelengths(config)
    assert found.keys() == {*config.layer_types}
    for kind, values in found.items():
        long = config.model_type in ("gemma3", "gemma4") and kind == FULL
        factor = 8.0 if long and name in ("gemma-3-4b", "gemma-3-12b", "gemma-3-27b") else 1.0
        gemma4_full = config.model_type == "gemma4" and kind == FULL
        expected = formula(1e6 if long else 1e4, 512 if gemma4_full else config.head_dim, factor)
        if gemma4_full:  # a quarter of the pairs is rotated
            expected[64:] = [math.inf] * 192
        assert values == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("attention_factor", [1.0, 1.3])
def test_wavelengths_with_yarn(truncate, attention_factor):
    """transformers' inverse frequencies. Fast pairs keep theirs, slow ones are divided by 8. (Of a
    Gemma 3, whose layers have two kinds of parameters, transformers 5.24 ignores `truncate`.)"""
    rope = RopeParameters(1e4, "yarn", 8.0, 256, attention_factor, truncate=truncate)
    config = replace(CONFIGS["gemma-mqa"], full_rope=rope, sliding_rope=rope, head_dim=64)
    frequency, scale = ROPE_INIT_FUNCTIONS["yarn"](transformers_config(config), "cpu")
    assert scale == attention_factor
    found = wavelengths(config)
    assert found[FULL] == pytest.approx((2 * math.pi / frequency).tolist(), rel=1e-5)
    plain = formula(1e4, 64)
    assert found[FULL][0] == pytest.approx(plain[0])
    assert found[FULL][-1] == pytest.approx(8 * plain[-1], rel=1e-5)


@pytest.mark.parametrize("name", ["gemma-2b", "gemma-3-27b"])
def test_rotations_are_plain_trigonometry(name):
    config = PRESETS[name]
    found = rotations(config)
    half = config.head_dim // 2
    assert found["pairs"] == [0, half // 8]
    assert found["type"] == config.layer_types[0]
    assert (len(found["vectors"]), len(found["vectors"][0])) == (2, 5)
    for pair, vectors in zip(found["pairs"], found["vectors"], strict=True):
        for position, vector in enumerate(vectors):
            angle = position / 1e4 ** (pair / half)
            assert vector == pytest.approx([math.cos(angle), math.sin(angle)], abs=1e-6)


@pytest.mark.parametrize(("d", "pairs"), [(2, [0]), (4, [0, 1]), (16, [0, 1]), (256, [0, 16])])
def test_pairs_that_are_rotated(d, pairs):
    assert rotations(replace(CONFIGS["gemma-mqa"], head_dim=d))["pairs"] == pairs


def test_first_layer_is_full():
    """The heads of full layers are wider; the first pairs are rotated."""
    config = replace(PRESETS["gemma-4-e2b"], layer_types=(FULL,) * 35)
    found = rotations(config)
    assert (found["pairs"], found["type"]) == ([0, 32], FULL)
    angle = 1e6 ** (-32 / 256)
    assert found["vectors"][1][1] == pytest.approx([math.cos(angle), math.sin(angle)], abs=1e-6)


def test_flatness_of_known_maps():
    """Equal weights: 1. One key: 0. Queries with a single visible key do not count."""
    causal = torch.ones(3, 3).tril().bool()
    flat = causal / causal.sum(-1, keepdim=True)
    first = torch.tensor([[1.0, 0, 0]] * 3)
    mixed = torch.stack((flat[0], first[1], flat[2]))
    assert flatness(torch.stack((flat, first, mixed)), causal) == pytest.approx([1, 0, 0.5])
    halves = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0.5, 0.5, 0]])
    expected = math.log(2) / math.log(3) / 2
    assert flatness(halves[None], causal) == pytest.approx([expected])
    assert flatness(torch.ones(2, 1, 1), torch.ones(1, 1).bool()) == [0, 0]


def test_flatness_counts_a_visible_key_whose_weight_is_rounded_to_0():
    weights = torch.tensor([[[0.5, 0.5, 0]]])
    seen = torch.ones(1, 3).bool()
    assert flatness(weights, seen) == pytest.approx([math.log(2) / math.log(3)])


def test_mlp_example():
    """Each point of each surface, from the stored weights, with numbers instead of tensors."""
    found = mlp_example()
    gate, up, down = (found["weights"][x] for x in ("gate", "up", "down"))
    assert (len(gate), len(up), len(down)) == (3, 3, 1)
    line = found["inputs"]
    assert line == pytest.approx([-2 + 0.1 * i for i in range(41)], abs=1e-6)

    def gelu(x: float) -> float:
        return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    functions = {
        "linear": lambda g, u: g,
        "ReLU": lambda g, u: max(g, 0),
        "ReGLU": lambda g, u: max(g, 0) * u,
        "GeGLU": lambda g, u: gelu(g) * u,
    }
    assert [*found["surfaces"]] == [*functions]
    for name, function in functions.items():
        for row, x1 in zip(found["surfaces"][name], line, strict=True):
            expected = [
                sum(
                    w * function(g[0] * x0 + g[1] * x1, u[0] * x0 + u[1] * x1)
                    for w, g, u in zip(down[0], gate, up, strict=True)
                )
                for x0 in line
            ]
            assert row == pytest.approx(expected, abs=1e-5)
        assert found["slices"][name] == found["surfaces"][name][line.index(found["slice_at"])]
    assert found["slice_at"] == pytest.approx(0.5)
    curve = found["gelu"]
    assert curve["gelu"] == pytest.approx([gelu(x) for x in curve["x"]], abs=1e-6)
    assert curve["relu"] == [max(x, 0) for x in curve["x"]]
    assert (curve["x"][0], curve["x"][-1]) == (-4, 4)


def test_rounded():
    given = {"a": [1.234567, float("nan")], "b": (float("inf"), -float("inf"), 3, "x", None, True)}
    assert rounded(given) == {"a": [1.2346, None], "b": [None, None, 3, "x", None, True]}
    assert rounded(123456.7) == 123460.0
    assert rounded(1.23456e-20) == 1.2346e-20
    assert type(rounded(123456)) is int


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("▁to", "▁to"), ("a\nb", "a↵b"), ("\x00\x1b", "\\x00\\x1b"), ("\t", "\\t"),
        ("\u202e", "\\u202e"), ("\ud800", "\\ud800"), ("\ufffe", "\\ufffe"),
        ("漢字😀שלום", "漢字😀שלום"),
    ],
)  # fmt: skip
def test_visible(token, expected):
    assert visible(token) == expected
