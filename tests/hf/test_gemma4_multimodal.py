"""Checks multimodal Gemma 4: only its text decoder runs on the kernels.

Tokens of an image attend to each other in layers with a window, whose attention falls back then. In
Gemma4Unified's forward they also do so in full layers."""

import copy

import pytest
import torch
import transformers
from hf_models import GEMMA4, generate, logits, prompt
from tiny_models import close, randomize

from gemma_fast.hf import GemmaFastCache, accelerate, explain, restore
from gemma_fast.hf.layers import Fast

KINDS = {"Gemma4": "gemma4", "Gemma4Unified": "gemma4-unified"}
IMAGE, AUDIO, VIDEO = 7, 6, 5  # token ids
TOWERS = {
    "Gemma4VisionConfig": {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 2, "patch_size": 2,
        "pooling_kernel_size": 2, "position_embedding_size": 16,
    },
    "Gemma4AudioConfig": {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "output_proj_dims": 16, "subsampling_conv_channels": [8, 4],
    },
    "Gemma4UnifiedVisionConfig": {
        "patch_size": 2, "pooling_kernel_size": 2, "mm_embed_dim": 16, "output_proj_dims": 16,
        "mm_posemb_size": 16,
    },
    "Gemma4UnifiedAudioConfig": {"output_proj_dims": 16},
}  # fmt: skip


def build(kind, attention="eager", head="ForConditionalGeneration"):
    """Returns a multimodal model in which each image takes 4 tokens."""
    text = copy.deepcopy(GEMMA4[KINDS[kind]]) | {"use_bidirectional_attention": "vision"}
    towers = {
        f"{name.lower()}_config": getattr(transformers, f"{kind}{name}Config")(
            **TOWERS[f"{kind}{name}Config"]
        )
        for name in ("Vision", "Audio")
    }
    config = getattr(transformers, f"{kind}Config")(
        text_config=getattr(transformers, f"{kind}TextConfig")(**text), **towers,
        image_token_id=IMAGE, audio_token_id=AUDIO, video_token_id=VIDEO,
    )  # fmt: skip
    implementation = {"": attention, "text_config": attention, "audio_config": "eager"}
    model = getattr(transformers, kind + head)
    return randomize(model._from_config(config, attn_implementation=implementation))


def image_inputs(kind):
    """Returns a prompt with the 4 tokens of one image, and its pixels in patches."""
    ids = prompt(b=1, t=20).clamp(min=8)
    ids[0, 5:9] = IMAGE
    side, pixels = (4, 2 * 2 * 3) if kind == "Gemma4" else (2, 4 * 4 * 3)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    generator = torch.Generator().manual_seed(2)
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.rand(1, side**2, pixels, generator=generator),
        "image_position_ids": torch.stack((x, y), dim=2).view(1, side**2, 2),
    }  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_image_gives_the_same_output(kind, attention):
    model, inputs = build(kind, attention), image_inputs(kind)
    options = {"max_new_tokens": 12, "do_sample": False}
    expected, text = model(**inputs).logits, model.generate(**inputs, **options)
    plain = model(**inputs | {"mm_token_type_ids": None}).logits
    assert (plain - expected).abs().max() > 1e-3, "image tokens must attend to each other"
    accelerate(model)
    close(model(**inputs).logits, expected)
    close(model(**inputs, labels=inputs["input_ids"]).logits, expected)
    close(model(**inputs, logits_to_keep=3).logits, expected[:, -3:])
    assert torch.equal(model.generate(**inputs, **options), text)
    lines = explain(model, **inputs)
    paths = [(line.path, line.why) for line in lines if line.part == "attention"]
    full = "reference" if kind == "Gemma4" else "transformers"
    assert [path for path, _ in paths] == ["transformers", full] * 2
    assert all("the mask hides more than causality" in reason for _, reason in paths[::2])
    assert {line.path for line in lines if line.part != "attention"} == {"reference"}
    with pytest.raises(ValueError, match="use a DynamicCache or a StaticCache"):
        model(**inputs, past_key_values=GemmaFastCache(model.config, 60))


@pytest.mark.parametrize("kind", KINDS)
def test_text_gives_the_same_output_and_towers_stay(kind):
    """Processors return token types for a text without images, too."""
    model, ids = build(kind), prompt(b=1).clamp(min=8)
    expected, text = logits(model, ids), generate(model, ids)
    towers = {n: type(m) for n, m in model.named_modules() if "language_model" not in n}
    accelerate(model, strict=True)
    for types in (None, torch.zeros_like(ids)):
        close(logits(model, ids, mm_token_type_ids=types), expected)
        assert torch.equal(generate(model, ids, mm_token_type_ids=types), text)
    cache = GemmaFastCache(model.config, 60)
    assert torch.equal(generate(model, ids, past_key_values=cache), text)
    modules = dict(model.named_modules())
    assert {n: type(m) for n, m in modules.items() if "language_model" not in n} == towers
    assert not any(isinstance(modules[name], Fast) for name in towers)
    lines = explain(model)
    assert all("language_model" in line.module for line in lines)
    assert {line.path for line in lines} == {"reference"}
    assert torch.equal(logits(restore(model), ids), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_base_model_gives_the_same_hidden_states(kind):
    model, ids = build(kind, head="Model"), prompt(b=1).clamp(min=8)
    expected = model(ids).last_hidden_state
    close(accelerate(model, strict=True)(ids).last_hidden_state, expected)


@torch.no_grad()
def test_audio_gives_the_same_output():
    """Audio is causal, so all attention runs on the kernels."""
    model, ids = build("Gemma4"), prompt(b=1).clamp(min=8)
    ids[0, 3:8] = AUDIO
    frames = torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids, "input_features": frames, "mm_token_type_ids": (ids == AUDIO) * 3,
              "input_features_mask": torch.ones(1, 20, dtype=torch.bool)}  # fmt: skip
    expected = model(**inputs).logits
    assert (model(ids).logits - expected).abs().max() > 1e-3
    close(accelerate(model, strict=True)(**inputs).logits, expected)
