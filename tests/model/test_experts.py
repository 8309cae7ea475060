"""Compares the router's choices and weights with transformers. Most mistakes in the weights are
invisible in logits, because a norm follows the experts."""

from copy import deepcopy

import pytest
import torch
from marks import slow
from tiny_models import close, left_padded

from gemma_fast import reference
from gemma_fast.kernels.router import choose_experts_reference, norm_router
from gemma_fast.model import layer as layer_module
from gemma_fast.reference import Reference

pytestmark = pytest.mark.parametrize("twins", ["gemma4-experts"], indirect=True)


@torch.no_grad()
def choices_of_transformers(hf, ids, mask=None):
    """Returns (chosen, weights) :: [b * t, top_k] of each layer."""
    found = []
    hooks = [
        layer.router.register_forward_hook(lambda router, args, out: found.append(out[:0:-1]))
        for layer in hf.model.layers
    ]
    hf(ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    return found


class Recording(Reference):
    def observe(self, name, x):
        self.found[name] = x
        return x

    def choices(self, ids, mask=None):
        self.found = {}
        self(ids, attention_mask=mask)
        names = [f"model.layers.{i}.router" for i in range(self.config.num_hidden_layers)]
        return [(self.found[f"{name}.chosen"], self.found[f"{name}.weights"]) for name in names]


def choices_of_model(model, ids, monkeypatch, mask=None):
    found = []

    def recording(*args, **options):
        out = norm_router(*args, **options)
        found.append([x.flatten(0, 1).cpu() for x in out[-2:]])
        return out

    monkeypatch.setattr(layer_module, "norm_router", recording)
    model(ids, attention_mask=mask)
    return found


def same(found, expected, rows=slice(None)):
    """Asserts equal choices, and weights that differ by rounding errors only."""
    assert len(found) == len(expected) > 0
    for (chosen, weights), (right, exact) in zip(found, expected, strict=True):
        assert torch.equal(chosen[rows].long(), right[rows])
        torch.testing.assert_close(weights[rows], exact[rows], rtol=1e-4, atol=1e-6)


def test_reference_chooses_as_transformers(twins):
    ids = twins.prompt(2, 40)
    expected = choices_of_transformers(twins.hf, ids)
    same(Recording(twins.config, twins.reference.weights).choices(ids), expected)


@pytest.mark.parametrize(("b", "t"), [(2, 1), (1, 19), *slow((8, 1), (9, 1))])
def test_model_chooses_as_transformers(twins, b, t, device, monkeypatch):
    ids = twins.prompt(b, t)
    expected = choices_of_transformers(twins.hf, ids)
    model = deepcopy(twins.model).to(device)
    same(choices_of_model(model, ids.to(device), monkeypatch), expected)


def test_model_with_left_padding_chooses_as_transformers(twins, monkeypatch):
    _, ids, mask = left_padded(twins, [19, 5])
    expected = choices_of_transformers(twins.hf, ids, mask)
    rows = mask.flatten().bool()
    same(choices_of_model(twins.model, ids, monkeypatch, mask), expected, rows)
    same(Recording(twins.config, twins.reference.weights).choices(ids, mask), expected, rows)


def test_weights_of_a_token_add_up_to_one(twins):
    """Before each expert's scale multiplies them. Logits cannot show this."""
    for i, (chosen, weights) in enumerate(choices_of_transformers(twins.hf, twins.prompt(2, 40))):
        scale = twins.hf.model.layers[i].router.per_expert_scale[chosen]
        torch.testing.assert_close((weights / scale).sum(-1), torch.ones(len(chosen)))


def not_renormalized(scores, scale, top_k):
    weights, chosen = scores.softmax(-1).topk(top_k)
    return chosen, weights * scale[chosen]


def renormalized_after_the_scale(scores, scale, top_k):
    chosen, weights = not_renormalized(scores, scale, top_k)
    return chosen, weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("wrong", [not_renormalized, renormalized_after_the_scale])
def test_wrong_sum_of_the_weights_is_detected(twins, wrong, monkeypatch):
    ids = twins.prompt(2, 40)
    expected = choices_of_transformers(twins.hf, ids)
    monkeypatch.setattr(reference, "choose_experts", wrong)
    found = Recording(twins.config, twins.reference.weights).choices(ids)
    with pytest.raises(AssertionError, match="not close"):
        same(found, expected)


def softmax_of_the_chosen(scores, scale, top_k):
    scores, chosen = scores.topk(top_k)
    return chosen, scores.softmax(-1) * scale[chosen]


def test_softmax_after_the_choice_is_the_same(twins, monkeypatch):
    """exp(s) / sum of the chosen exp(s) is the softmax of the chosen scores: no mistake."""
    ids = twins.prompt(2, 40)
    expected = choices_of_transformers(twins.hf, ids)
    monkeypatch.setattr(reference, "choose_experts", softmax_of_the_chosen)
    same(Recording(twins.config, twins.reference.weights).choices(ids), expected)


@pytest.mark.parametrize(("b", "t"), [(2, 1), (1, 11)])
def test_of_equal_experts_those_of_lower_index_are_chosen(twins, b, t, device, monkeypatch):
    """With routers of zeros, all experts are equal."""
    ids, model = twins.prompt(b, t), deepcopy(twins.model)
    with torch.no_grad():
        for layer in model.layers:
            layer.router_proj.zero_()
    weights = {
        name: torch.zeros_like(x) if name.endswith("router.proj.weight") else x
        for name, x in twins.reference.weights.items()
    }
    monkeypatch.setattr(reference, "choose_experts", choose_experts_reference)
    expected = Recording(twins.config, weights)
    for chosen, _ in expected.choices(ids):
        assert torch.equal(chosen, torch.arange(3, dtype=torch.int32).expand(b * t, 3))
    found = choices_of_model(model.to(device), ids.to(device), monkeypatch)
    same(found, [(chosen.long(), weights) for chosen, weights in expected.choices(ids)])
    close(model(ids.to(device)).logits.cpu(), expected(ids).logits)
