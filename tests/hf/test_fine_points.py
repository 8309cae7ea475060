"""Checks gemma_fast.hf for mistakes that other fast implementations of Gemma made, and checks
multimodal Gemma 3."""

import pytest
import torch
import transformers
from hf_models import FAMILIES, logits, make, prompt
from tiny_models import close
from triton_interpreter import interpreter

from gemma_fast.hf import accelerate, explain, restore
from gemma_fast.hf.layers import swap_in


@pytest.mark.parametrize("family", [x for x in FAMILIES if x != "gemma4"])
@pytest.mark.parametrize("kernel", [False, True], ids=["reference", "kernel"])
def test_one_plus_weight_is_summed_in_fp32(family, kernel):
    """bfloat16 cannot represent 1 + 15.8125 exactly, and float16 cannot represent 1 + 2**-11."""
    dtype = torch.float16 if kernel else torch.bfloat16
    norm = make(family).to(dtype).model.layers[0].input_layernorm.eval()
    weight = torch.tensor([15.8125, 2**-9 + 1, 2**-11] * 16, dtype=dtype)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    x = torch.randn(64, 48, dtype=dtype)
    normed = x.double() / (x.double().square().mean(-1, keepdim=True) + norm.eps).sqrt()
    exact = normed * (1 + weight.double())
    swap_in(norm, "norm", strict=False)
    with interpreter() if kernel else torch.no_grad():
        found = norm(x)

    def far(y):
        return (
            (y.double() - exact).abs() > 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-7
        ).any()

    assert not far(found)
    assert far((normed * (1 + weight)).to(dtype)), "this test must detect a sum in 16 bits"


@pytest.mark.parametrize("kernel", [False, True], ids=["reference", "kernel"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_of_the_caller_are_not_overwritten(family, kernel):
    """Checks four tensors: the input of a norm (the residual), the input of an MLP, inputs_embeds,
    and the keys of earlier tokens in the cache."""
    model = accelerate(make(family), strict=True)
    held = []

    def keep(module, args, output):
        held.append((args[0], args[0].clone(), output))

    for module in model.modules():
        if getattr(module, "part", None) in ("norm", "mlp"):
            module.register_forward_hook(keep)
    embeds = model.get_input_embeddings()(prompt(t=9))
    before = embeds.clone()
    with torch.inference_mode(), interpreter() if kernel else torch.no_grad():
        cache = model(inputs_embeds=embeds).past_key_values
        layer = cache.layers[0]
        keys, copies = layer.keys, layer.keys.clone()
        model(input_ids=prompt(t=1), past_key_values=cache)
    assert torch.equal(embeds, before) and torch.equal(keys, copies)
    assert len(held) > 2 * model.config.num_hidden_layers
    for given, copied, output in held:
        assert torch.equal(given, copied)
        assert given.untyped_storage().data_ptr() != output.untyped_storage().data_ptr()


@pytest.fixture(scope="module")
def multimodal():
    """Returns a Gemma 3 with a vision tower, in which each image takes 4 tokens."""
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 8,
        "num_attention_heads": 2, "patch_size": 2,
    }  # fmt: skip
    text = make("gemma3-gqa").config.to_dict()
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=7,
        boi_token_index=5, eoi_token_index=6, image_token_id=7,
    )  # fmt: skip
    config._attn_implementation = "eager"
    torch.manual_seed(3)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    for weight in model.parameters():
        weight.data.normal_(std=0.2)
    return model


def test_multimodal_model_gives_the_same_output_for_text(multimodal):
    ids = prompt(t=20).clamp(min=8)
    expected = logits(multimodal, ids)
    text = multimodal.generate(ids, max_new_tokens=8, do_sample=False)
    accelerate(multimodal, strict=True)
    close(logits(multimodal, ids), expected)
    assert torch.equal(multimodal.generate(ids, max_new_tokens=8, do_sample=False), text)
    modules = dict(multimodal.named_modules())
    assert all("language_model" in line.module for line in explain(multimodal))
    assert not any(hasattr(m, "part") for n, m in modules.items() if "language_model" not in n)
    restore(multimodal)


def test_multimodal_model_gives_the_same_output_for_an_image(multimodal):
    """Image tokens attend to each other in both directions, so transformers' attention runs."""
    ids = prompt(b=1, t=20).clamp(min=8)
    ids[0, 5:9] = 7
    inputs = {
        "input_ids": ids, "token_type_ids": (ids == 7).long(),
        "pixel_values": torch.randn(1, 3, 8, 8), "attention_mask": torch.ones_like(ids),
    }  # fmt: skip
    with torch.no_grad():
        expected = multimodal(**inputs).logits
        text = multimodal.generate(**inputs, max_new_tokens=8, do_sample=False)
        accelerate(multimodal)
        close(multimodal(**inputs).logits, expected)
        assert torch.equal(multimodal.generate(**inputs, max_new_tokens=8, do_sample=False), text)
        paths = {(line.part, line.path) for line in explain(multimodal, **inputs)}
    assert ("attention", "transformers") in paths and ("norm", "reference") in paths
    restore(multimodal)
