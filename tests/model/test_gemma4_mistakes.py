"""Tests that known mistakes in Gemma 4 are detected: each fact of the family is broken once.

Logits cannot show the factor 2^-0.5 of the per-layer inputs, because a norm cancels it. Its test
compares intermediate values. test_expert_mistakes.py has the facts of the mixture of experts.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny_models import CONFIGS, close, refuse

from gemma_fast import reference
from gemma_fast.config import GemmaConfig
from gemma_fast.reference import Reference

GEMMA4 = [name for name in CONFIGS if name.startswith("gemma4")]
pytestmark = pytest.mark.parametrize("twins", GEMMA4, indirect=True)


class ValuesHaveTheNormOfKeys(Reference):
    def key_values(self, i, x, cos_sin, past):
        k, v = super().key_values(i, x, cos_sin, past)
        weight = self.weights[f"model.layers.{i}.self_attn.k_norm.weight"]
        return k, v * weight


class ValuesAreRotated(Reference):
    def key_values(self, i, x, cos_sin, past):
        k, v = super().key_values(i, x, cos_sin, past)
        return k, reference.rotate(v, *cos_sin)


class RotatedBeforeTheNorm(Reference):
    def norm(self, x, name):
        if not name.endswith(("q_norm", "k_norm")):
            return super().norm(x, name)
        cos, sin = self.cos_sin
        return super().norm(reference.rotate(x, cos, sin), name)

    def attention(self, i, x, visible, cos_sin, *others):
        self.cos_sin = cos_sin
        unchanged = torch.ones_like(cos_sin[0]), torch.zeros_like(cos_sin[1])
        return super().attention(i, x, visible, unchanged, *others)


class NormMissing(Reference):
    """A norm whose name ends like `missing` returns its input."""

    missing = ""

    def norm(self, x, name):
        return x if name.endswith(self.missing) else super().norm(x, name)


class QueryNormMissing(NormMissing):
    missing = "q_norm"


class KeyNormMissing(NormMissing):
    missing = "k_norm"


class PerLayerNormMissing(NormMissing):
    missing = "post_per_layer_input_norm"


class ProjectionNormMissing(NormMissing):
    missing = "per_layer_projection_norm"


class ScalarMissing(Reference):
    def __init__(self, config, weights):
        super().__init__(config, {k: v for k, v in weights.items() if "layer_scalar" not in k})


class ScalarBeforePerLayer(Reference):
    """Multiplies the stream before the update from the per-layer embeddings is added."""

    def add_per_layer(self, name, hiddens, per_layer):
        scalar = self.weights[f"{name}.layer_scalar"]
        added = super().add_per_layer(name, hiddens, per_layer) - hiddens
        return hiddens + added / scalar


class ScalarOfTheUpdateOnly(Reference):
    def layer(self, i, hiddens, *others):
        out, key_values = super().layer(i, hiddens, *others)
        scalar = self.weights[f"model.layers.{i}.layer_scalar"]
        return hiddens + (out / scalar - hiddens) * scalar, key_values


class SharesTheFirstLayer(Reference):
    """Reads K and V of the first layer of its type instead of the last one."""

    def layer(self, i, hiddens, visible, cos_sin, past=None, shared=None, per_layer=None):
        kind = self.config.layer_types[i]
        self.first = {} if i == 0 else self.first
        shared = None if shared is None else self.first[kind]
        out, key_values = super().layer(i, hiddens, visible, cos_sin, past, shared, per_layer)
        self.first.setdefault(kind, key_values)
        return out, key_values


class NextLayersInput(Reference):
    """Reads the per-layer input of the next layer."""

    def layer(self, i, *others):
        *others, per_layer = others
        return super().layer(i, *others, None if per_layer is None else per_layer.roll(-1, 2))


def usual_partial_rotation(rope, d, positions, right=reference.angles):
    """Angles of a partial rotary embedding: frequencies over the rotated channels only."""
    cos, sin = right(rope, d, positions)
    if rope.rope_type != "proportional":
        return cos, sin
    part = int(d * rope.partial_rotary_factor)
    some = right(rope._replace(rope_type="default"), part, positions)
    return tuple(
        torch.cat((x, whole[..., part // 2 :]), dim=-1)
        for x, whole in zip(some, (cos, sin), strict=True)
    )


def any_model(config: GemmaConfig) -> bool:
    return True


def shares(config: GemmaConfig) -> bool:
    return config.num_kv_shared_layers > 0


def has_per_layer(config: GemmaConfig) -> bool:
    return config.hidden_size_per_layer_input > 0


MISTAKES: dict[type[Reference], Callable[[GemmaConfig], bool]] = {
    **dict.fromkeys(
        (
            ValuesHaveTheNormOfKeys, ValuesAreRotated, RotatedBeforeTheNorm, QueryNormMissing,
            KeyNormMissing, ScalarMissing, ScalarOfTheUpdateOnly,
        ),
        any_model,
    ),
    SharesTheFirstLayer: shares,
    **dict.fromkeys(
        (PerLayerNormMissing, ProjectionNormMissing, ScalarBeforePerLayer, NextLayersInput),
        has_per_layer,
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_mistake_is_detected(twins, mistake):
    if not MISTAKES[mistake](twins.config):
        pytest.skip("the model does not have this step")
    refuse(twins, mistake(twins.config, twins.reference.weights))


@pytest.mark.parametrize(("name", "wrong"), [("v_norm", False), ("norm_offset", 1.0)])
def test_wrong_property_is_detected(twins, name, wrong, monkeypatch):
    expected = twins.model(ids := twins.prompt(2, 40)).logits
    monkeypatch.setattr(GemmaConfig, name, wrong)
    with pytest.raises(AssertionError, match="not close"):
        close(twins.reference(ids).logits, expected)


def test_usual_partial_rotation_is_detected(twins, monkeypatch):
    monkeypatch.setattr(reference, "angles", usual_partial_rotation)
    refuse(twins, twins.reference)


@pytest.mark.parametrize("factor", [1.0, 0.5], ids="factor {}".format)
def test_wrong_share_of_rotated_channels_is_detected(twins, factor):
    rope = twins.config.full_rope._replace(partial_rotary_factor=factor)
    refuse(twins, Reference(replace(twins.config, full_rope=rope), twins.reference.weights))


def per_layer_inputs_of(twins, ids):
    """Returns transformers' inputs of the layers' gates."""
    text = twins.hf.model
    embeddings = text.embed_tokens(ids)
    return text.project_per_layer_inputs(embeddings, text.get_per_layer_inputs(ids, embeddings))


def test_per_layer_inputs_equal_transformers(twins):
    if not twins.config.hidden_size_per_layer_input:
        pytest.skip("no per-layer embeddings")
    ids = twins.prompt(2, 9)
    expected = per_layer_inputs_of(twins, ids)
    embeddings = reference.embed(ids, twins.reference.weights["model.embed_tokens.weight"])
    for model in (twins.reference.per_layer_inputs, twins.model.per_layer):
        close(model(ids, embeddings), expected)
        with pytest.raises(AssertionError, match="not close"):
            close(model(ids, embeddings) * 2**0.5, expected)
