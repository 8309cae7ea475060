"""Checks that models with quantized linears on the kernels can be restored, copied, converted,
saved and trained with adapters."""

import copy
import pickle

import peft
import pytest
import torch
from hf_models import logits, prompt
from quantized_linears import (
    COMPRESSED,
    FORMATS,
    linears,
    lines_of,
    make,
    quantize,
    tiny_model,
)
from tiny_models import close

from gemma_fast.hf import accelerate, accelerated, restore
from gemma_fast.hf import layers as hf_layers


@pytest.mark.parametrize("name", FORMATS)
def test_restored_model_is_as_before_acceleration(name):
    model, ids = make(name), prompt()
    before = {n: x.clone() for n, x in model.state_dict().items()}
    classes, attributes = [[f(m) for m in model.modules()] for f in (type, lambda m: set(vars(m)))]
    accelerate(model, linear=True, strict=True)
    logits(model, ids)
    for act in (lambda: None, lambda: restore(model)):  # what a checkpoint would get, then restored
        act()
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[n], before[n]) for n in before)
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert hasattr(model, "ct_decompress_hook") == (name in COMPRESSED)
    assert torch.equal(logits(model, ids), logits(make(name), ids))


def test_weights_are_not_unpacked_at_the_first_call():
    """And a text decoder alone also restores the whole model."""
    model = accelerate(make("ct-int8-row"), linear=True)
    logits(model, prompt())
    assert not hasattr(model, "ct_decompress_hook")
    assert all("weight" not in x._parameters for x in linears(model).values())
    restore(model.model)
    assert hasattr(model, "ct_decompress_hook")
    assert torch.equal(logits(model, prompt()), logits(make("ct-int8-row"), prompt()))


def test_adapters_around_linears_can_be_trained_and_loaded():
    """peft does not adapt linears of compressed-tensors, which have no weight until the first
    call."""
    ids = prompt(b=1, t=9)
    model = accelerate(make("ao-int8-row"), linear=True)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    lora = peft.get_peft_model(model, config)
    lora(input_ids=ids, labels=ids).loss.backward()
    trained = {n: x for n, x in lora.named_parameters() if x.requires_grad}
    assert len(trained) == 8 and all(x.grad is not None and "lora" in n for n, x in trained.items())
    for x in trained.values():
        x.data.normal_(std=0.1)
    lora.eval()
    peft.set_peft_model_state_dict(lora, peft.get_peft_model_state_dict(lora))
    found = logits(lora, ids)
    assert {x.path for x in lines_of(lora)} == {"reference"}
    expected = logits(restore(lora), ids)
    close(found, expected)
    assert (expected - logits(make("ao-int8-row"), ids)).abs().max() > 0.01


@pytest.mark.parametrize("name", ["ct-int4-g64-zero", "ct-int8-row"])
def test_model_can_be_converted_to_another_dtype(name):
    ids = prompt()
    exact = logits(make(name), ids)
    theirs = (logits(make(name).bfloat16(), ids).float() - exact).square().mean().sqrt()
    model = accelerate(make(name), linear=True).bfloat16()
    found = logits(model, ids)
    packed = model.model.layers[0].mlp.up_proj.packed
    assert found.dtype == torch.bfloat16 and packed.packing.scale != torch.float32
    assert (found.float() - exact).square().mean().sqrt() < 1.1 * theirs
    expected = make(name).bfloat16().state_dict()
    assert all(torch.equal(x, expected[n]) for n, x in restore(model).state_dict().items())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ct-int4-g64-zero", "ct-int8-row"])
def test_model_can_be_moved_between_devices(name):
    ids = prompt()
    expected = logits(model := accelerate(make(name), linear=True), ids)
    close(logits(model.cuda(), ids.cuda()).cpu(), expected)
    assert {line.path for line in lines_of(model)} == {"triton"}
    assert torch.equal(logits(model.cpu(), ids), expected)


def test_context_manager_restores_the_state_before_it():
    model, ids = make("ct-int4-g32"), prompt()
    expected = logits(make("ct-int4-g32"), ids)
    with accelerated(model, linear=True):
        close(logits(model, ids), expected)
    assert hasattr(model, "ct_decompress_hook") and not lines_named_fast(model)
    accelerate(model, linear=True)
    with accelerated(model, linear=False):
        assert hasattr(model, "ct_decompress_hook") and not lines_named_fast(model)
    assert not hasattr(model, "ct_decompress_hook")
    close(logits(model, ids), expected)
    assert len(lines_named_fast(accelerate(model, linear=True))) == len(linears(model))


def lines_named_fast(model):
    return [n for n, x in model.named_modules() if isinstance(x, hf_layers.FastLinear)]


@pytest.mark.parametrize("name", ["ct-int4-g32", "ao-int8-row"])
def test_copies_are_accelerated_independently(name):
    ids = prompt()
    model = accelerate(make(name), linear=True, strict=True)
    expected = logits(model, ids)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, ids), expected)
    restore(other)
    assert {line.path for line in lines_of(model)} == {"reference"}
    close(logits(other, ids), expected)


def test_pickled_model_gives_the_same_logits():
    """compressed-tensors' own models cannot be pickled, because of their hook."""
    ids = prompt()
    model = accelerate(tiny_model(), linear=True)
    module = quantize(model, "ao-int8-row") and accelerate(model, linear=True)
    expected = logits(module, ids)
    other = pickle.loads(pickle.dumps(module.model.layers[0].mlp.up_proj))
    assert isinstance(other, hf_layers.FastLinear) and not expected.isnan().any()
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert torch.equal(other(x), module.model.layers[0].mlp.up_proj(x))


def test_state_dict_must_be_loaded_into_a_restored_model():
    model = accelerate(make("ct-int4-g32"), linear=True)
    with pytest.raises(RuntimeError, match=r"q_proj\.\*: call gemma_fast.hf.restore\(model\)"):
        model.load_state_dict(model.state_dict())
    state = make("ct-int4-g32").state_dict()
    restore(model).load_state_dict(state)
