"""Tests that known mistakes in the mixture of experts are detected in logits: each fact of Gemma 4
26B-A4B is broken once.

Logits cannot show whether the weights of a token's experts add up to 1, because a norm follows.
test_experts.py compares these weights."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from tiny_models import refuse

from gemma_fast import reference
from gemma_fast.reference import Reference

pytestmark = pytest.mark.parametrize("twins", ["gemma4-experts"], indirect=True)


class RouterHasTheNormedInput(Reference):
    def route(self, name, hiddens):
        layer = name.removesuffix(".router")
        return super().route(name, self.norm(hiddens, f"{layer}.pre_feedforward_layernorm"))


class RouterHasTheInputOfTheExperts(Reference):
    def route(self, name, hiddens):
        layer = name.removesuffix(".router")
        return super().route(name, self.norm(hiddens, f"{layer}.pre_feedforward_layernorm_2"))


class RootOfHiddenMissing(Reference):
    """The router's input is not divided by sqrt(hidden)."""

    def project(self, x, name):
        factor = x.shape[-1] ** 0.5 if name.endswith("router.proj") else 1
        return super().project(x * factor, name)


class Changed(Reference):
    """Uses the norm `norms[name]` where the model uses the norm `name`; None: no norm. The weights
    whose names end like `ones` are ones."""

    norms: ClassVar[dict[str, str | None]]
    ones: ClassVar[str]

    def __init__(self, config, weights):
        ones = {k: torch.ones_like(x) for k, x in weights.items() if k.endswith(self.ones)}
        super().__init__(config, weights | ones)

    def norm(self, x, name):
        layer, _, last = name.rpartition(".")
        last = self.norms.get(last, last)
        return x if last is None else super().norm(x, f"{layer}.{last}")


def changed(name, norms=(), ones="none"):
    return type(name, (Changed,), {"norms": dict(norms), "ones": ones})


class GateAndUpSwapped(Reference):
    def project(self, x, name):
        if ".experts." in name:
            other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
            layer, _, last = name.rpartition(".")
            name = f"{layer}.{other.get(last, last)}"
        return super().project(x, name)


class MLPMissing(Reference):
    def mlp(self, name, x):
        out = super().mlp(name, x)
        return torch.zeros_like(out) if name.endswith(".mlp") else out


class ExpertsMissing(Reference):
    def experts(self, name, hiddens):
        return torch.zeros_like(hiddens)


class WeightsInTheWrongOrder(Reference):
    def route(self, name, hiddens):
        chosen, weights = super().route(name, hiddens)
        return chosen, weights.flip(-1)


class OneExpertTooFew(Reference):
    def __init__(self, config, weights):
        super().__init__(replace(config, top_k_experts=config.top_k_experts - 1), weights)


class FirstExperts(Reference):
    """Does not sort the experts by their probability."""

    def route(self, name, hiddens):
        chosen, weights = super().route(name, hiddens)
        return torch.arange(chosen.shape[1]).expand_as(chosen), weights


MLP_IN, MLP_OUT = "pre_feedforward_layernorm", "post_feedforward_layernorm_1"
EXPERTS_IN, EXPERTS_OUT = "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2"
MISTAKES = [
    RouterHasTheNormedInput, RouterHasTheInputOfTheExperts, RootOfHiddenMissing, GateAndUpSwapped,
    MLPMissing, ExpertsMissing, WeightsInTheWrongOrder, OneExpertTooFew, FirstExperts,
    changed("ScaleOfEachExpertMissing", ones="router.per_expert_scale"),
    changed("ScaleOfTheRouterMissing", ones="router.scale"),
    changed("NormOfTheRouterMissing", {"norm": None}),
    changed("ExpertsHaveTheInputOfTheMLP", {EXPERTS_IN: MLP_IN}),
    changed("MLPHasTheInputOfTheExperts", {MLP_IN: EXPERTS_IN}),
    changed("NormAfterTheMLPMissing", {MLP_OUT: None}),
    changed("NormAfterTheExpertsMissing", {EXPERTS_OUT: None}),
    changed("NormsAfterBothSwapped", {MLP_OUT: EXPERTS_OUT, EXPERTS_OUT: MLP_OUT}),
    changed("NormOfTheSumMissing", {"post_feedforward_layernorm": None}),
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_mistake_is_detected(twins, mistake):
    refuse(twins, mistake(twins.config, twins.reference.weights))


def chosen_by_scaled_probability(scores, scale, top_k):
    weights, chosen = (scores.softmax(-1) * scale).topk(top_k)
    return chosen, weights / (weights / scale[chosen]).sum(-1, keepdim=True)


def test_choice_by_scaled_probability_is_detected(twins, monkeypatch):
    monkeypatch.setattr(reference, "choose_experts", chosen_by_scaled_probability)
    refuse(twins, twins.reference)
