"""Checks routers and experts (Gemma 4 26B-A4B): results, what callers read, and fallbacks.

The truth is transformers' eager code in float32. Other tests of this folder run on a model that has
experts, too."""

import copy

import peft
import pytest
import torch
from hf_models import generate, logits, make, padded, prompt, why
from tiny_models import close
from torch import nn
from transformers.integrations.moe import ExpertsInterface

from gemma_fast.hf import accelerate, explain, restore

IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]


@pytest.fixture
def model():
    return make("gemma4-experts")


def layer(model, i=1):
    return model.model.layers[i]


def hiddens(model, tokens=50):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(tokens, model.config.hidden_size, generator=generator)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_results_are_the_same_for_each_experts_implementation(model, implementation):
    """The implementation stays in the config. The kernels run whatever it is."""
    ids = prompt()
    mask = padded(ids, 7, 0)
    expected, text = logits(model, ids, mask), generate(model, ids, mask)
    model.set_experts_implementation(implementation)
    accelerate(model, strict=True)
    assert {path for path, _ in why(model).values()} == {"reference"}
    real = mask.bool()
    close(logits(model, ids, mask)[real], expected[real])
    assert torch.equal(generate(model, ids, mask), text)
    assert model.config._experts_implementation == implementation
    assert restore(model).config._experts_implementation == implementation
    close(logits(model, ids, mask)[real], expected[real])


@torch.no_grad()
def test_router_returns_what_transformers_returns(model):
    router, h = layer(model).router, hiddens(model)
    p, weights, chosen = router(h)
    accelerate(model, strict=True)
    found = router(h)
    assert [x.dtype for x in found] == [p.dtype, weights.dtype, chosen.dtype]
    assert torch.equal(found[2], chosen)
    for mine, theirs in zip(found[:2], (p, weights), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=1e-7)
    scale = router.per_expert_scale[chosen]
    torch.testing.assert_close((found[1] / scale).sum(-1), torch.ones(len(h)), rtol=1e-6, atol=0)


@torch.no_grad()
def test_of_equal_experts_the_lower_index_is_chosen(model):
    accelerate(model, strict=True)
    router, h = layer(model).router, hiddens(model)
    router.proj.weight.zero_()
    p, weights, chosen = router(h)
    assert torch.equal(chosen, torch.tensor([[0, 1]]).expand_as(chosen))
    torch.testing.assert_close(weights, router.per_expert_scale[:2].expand_as(weights) / 2)
    torch.testing.assert_close(p, torch.full_like(p, 1 / 4))


@torch.no_grad()
def test_nan_of_one_token_does_not_reach_others(model):
    accelerate(model, strict=True)
    router, experts, h = layer(model).router, layer(model).experts, hiddens(model)
    _, weights, chosen = router(h)
    expected = experts(h, chosen, weights)
    h[7, 3] = torch.nan
    p, weights, chosen = router(h)
    assert chosen.min() >= 0 and chosen.max() < model.config.num_experts
    found = experts(h, chosen, weights)
    nan = torch.arange(len(h)) == 7
    for x in (p, weights, found):
        assert torch.equal(x.isnan().all(-1), nan) and torch.equal(x.isnan().any(-1), nan)
    torch.testing.assert_close(found[~nan], expected[~nan])


@torch.no_grad()
def test_hooks_and_recorded_router_logits_get_the_same_values(model):
    found, ids = [], prompt()
    for module in (layer(model).router, layer(model).experts):
        module.register_forward_hook(lambda module, args, out: found.append((args, out)))

    def values():
        found.clear()
        recorded = model(ids, output_router_logits=True).get("router_logits")
        return recorded, *(x for args, out in found for x in (*args, out))

    expected = values()
    accelerate(model, strict=True)
    again = values()
    assert len(again) == len(expected) == 7
    for mine, theirs in zip(again, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["router.proj", "router.norm"])
@pytest.mark.parametrize("first", ["hook", "accelerated"])
def test_hooks_inside_a_router_are_called(model, name, first):
    ids, calls = prompt(), []
    expected = logits(model, ids)
    if first == "accelerated":
        accelerate(model)
    layer(model).get_submodule(name).register_forward_hook(lambda *_: calls.append(name))
    if first == "hook":
        accelerate(model)
    close(logits(model, ids), expected)
    assert len(calls) == 1
    lines = {line.module: line for line in explain(model)}
    assert "its proj or norm has hooks" in lines["model.layers.1.router"].why
    assert lines["model.layers.1.router"].path == "transformers"
    assert lines["model.layers.0.router"].path == "reference"
    with pytest.raises(RuntimeError, match=r"layers\.1\.router cannot run .* has hooks"):
        accelerate(model, strict=True)


def left(model, part, *, expected=None):
    """Returns the reason why layer 1's part stays as it is. Checks the logits."""
    ids = prompt()
    expected = logits(model, ids) if expected is None else expected
    close(logits(accelerate(model), ids), expected)
    line = next(x for x in explain(model) if x.module == f"model.layers.1.{part}")
    assert line.path == "transformers"
    with pytest.raises(RuntimeError, match=r"strict=True requires"):
        explain(model, strict=True)
    return line.why


def test_experts_of_several_devices_stay(model):
    layer(model).experts._is_expert_parallel = True
    assert left(model, "experts") == "it has 4 of 4 experts, as in expert parallelism"


class Quantized(torch.Tensor):
    """A tensor subclass, like those of torchao and of tensor parallelism."""


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_weights_that_are_not_plain_tensors_stay(model, name):
    experts = layer(model).experts
    plain = experts._parameters[name]
    experts._parameters[name] = nn.Parameter(plain.data.mT.contiguous().mT)
    assert left(model, "experts") == f"its {name} is not contiguous"
    experts._parameters[name] = plain.data.as_subclass(Quantized)
    assert left(model, "experts") == f"its {name} is a Quantized, not a plain tensor"


def test_projection_that_is_not_a_plain_linear_stays(model):
    router, other = layer(model).router, copy.deepcopy(layer(model).router.proj)
    router.proj = nn.Sequential(other)
    assert left(model, "router").endswith("Sequential, not a plain torch.nn.Linear")
    other.bias = nn.Parameter(torch.zeros(4))
    router.proj = other
    assert left(model, "router").startswith("its proj has a bias")


def test_other_experts_implementations_stay(model):
    def foreign(module, x, chosen, weights):
        return 1.5 * type(module).forward.__wrapped__(module, x, chosen, weights)

    ExpertsInterface.register("foreign", foreign)
    plain = logits(model, prompt())
    model.set_experts_implementation("foreign")
    expected = logits(model, prompt())
    assert (expected - plain).abs().max() > 0.01
    reason = f"the model's experts implementation 'foreign' comes from {__name__}"
    assert left(model, "experts", expected=expected) == reason
    model.set_experts_implementation("eager")
    accelerate(model)
    model.set_experts_implementation("foreign")
    line = next(line for line in explain(model) if line.part == "experts")
    assert line == (line.module, "experts", "reference", line.why)
    assert line.why == reason + " after accelerate: call accelerate(model) again"


def test_other_activations_stay(model):
    other = accelerate(copy.deepcopy(model))
    for changed in (model, other):
        layer(changed).experts.act_fn = nn.GELU()
    expected = logits(model, prompt())
    assert "not the GELU's tanh approximation" in left(model, "experts")
    close(logits(other, prompt()), expected)
    line = next(x for x in explain(other) if x.module == "model.layers.1.experts")
    assert line.path == "transformers" and line.why.startswith("act_fn was replaced after")


@torch.no_grad()
def test_weights_of_another_dtype_fall_back(model):
    """For example if the router stays in float32."""
    model = accelerate(model.bfloat16())
    moe, h = layer(model), hiddens(model).bfloat16()
    _, weights, chosen = moe.router(h)
    moe.router.proj.float(), moe.experts.float()
    for call in (lambda: moe.router(h), lambda: moe.experts(h, chosen, weights)):
        with pytest.raises(RuntimeError, match="dtype"):  # of transformers
            call()
    assert moe.router.run.why == "its proj is torch.float32, but x is torch.bfloat16"
    assert moe.experts.run.why.startswith("the weights are torch.float32, torch.float32, but x is")


@pytest.mark.parametrize("first", ["accelerated", "adapted"])
def test_lora_adapters_of_experts_and_router_work(model, first):
    """peft adds the adapter of the experts to their weights while it calls them."""
    ids = prompt()
    config = peft.LoraConfig(
        r=2, target_modules=["router.proj"], target_parameters=["experts.gate_up_proj"]
    )
    plain = logits(model, ids)
    if first == "accelerated":
        accelerate(model)
    lora = peft.get_peft_model(model, config).eval()
    if first == "adapted":
        accelerate(lora)
    for name, weight in lora.named_parameters():
        if "lora" in name:
            weight.data.normal_(std=0.2)
    found, paths = logits(lora, ids), why(lora)
    assert paths["experts"][0] == "reference" and paths["router"][0] == "transformers"
    restore(lora)
    expected = logits(lora, ids)
    close(found, expected)
    assert (found - plain).abs().max() > 0.01
