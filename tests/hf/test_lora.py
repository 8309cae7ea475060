"""Checks that LoRA adapters of peft work on an accelerated model."""

import peft
import pytest
import torch
from hf_models import FAMILIES, logits, make, prompt
from tiny_models import close

from gemma_fast.hf import accelerate, explain, restore

GREEDY = {"max_new_tokens": 24, "do_sample": False}


@pytest.fixture(params=FAMILIES)
def model(request):
    return make(request.param)


@pytest.mark.parametrize("first", ["accelerated", "adapted"])
def test_lora_adapters_can_be_trained_and_merged(model, first):
    """Adds adapters to the projections, before or after acceleration."""
    ids = prompt()
    if first == "accelerated":
        accelerate(model)
    projections = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    adapted = [name for name, _ in model.named_modules() if name.split(".")[-1] in projections]
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=projections))
    if first == "adapted":
        assert accelerate(lora) is lora
    lora(input_ids=ids, labels=ids).loss.backward()
    trained = [(n, w) for n, w in lora.named_parameters() if w.requires_grad]
    assert len(trained) == 2 * len(adapted) > 0
    assert all(w.grad is not None and "lora" in n for n, w in trained)
    for _, weight in trained:
        weight.data.normal_(std=0.1)
    lora.eval()
    assert {line.path for line in explain(lora)} == {"reference"}
    found, text = (
        logits(lora, ids),
        lora.generate(input_ids=ids, **GREEDY),
    )
    restore(lora)
    close(found, logits(lora, ids))
    assert torch.equal(text, lora.generate(input_ids=ids, **GREEDY))
    accelerate(lora)
    close(logits(lora.merge_and_unload(), ids), found)
