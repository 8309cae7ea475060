"""Checks which models `accelerate` takes: the base models, every head, and bidirectional Gemma 3.

Hidden states or logits must be those before acceleration. Other architectures are refused."""

import copy
import logging

import pytest
import torch
import transformers
from hf_models import make, padded, prompt, why
from tiny_models import close, randomize
from torch import nn

from gemma_fast.hf import accelerate, explain, restore
from gemma_fast.hf import attention as hf_attention

VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 8,
    "num_attention_heads": 2, "patch_size": 2,
}  # fmt: skip
CLASSIFIERS = "ForSequenceClassification", "ForTokenClassification"
MODELS = [
    *(("Gemma" + head, "gemma-mqa") for head in ("Model", *CLASSIFIERS)),
    *(("Gemma2" + head, "gemma2-gqa") for head in ("Model", *CLASSIFIERS)),
    *(("Gemma3Text" + head, "gemma3-gqa") for head in ("Model", CLASSIFIERS[0])),
    *(("Gemma3" + head, "multimodal") for head in ("Model", CLASSIFIERS[0])),
    *(
        (f"Gemma4{kind}TextModel", f"gemma4{family}")
        for kind, family in (("", ""), ("", "-experts"), ("Unified", "-unified"))
    ),
]


def build(name, config, attention="eager"):
    """Returns a model of this class with random weights, in eval mode."""
    config = copy.deepcopy(config)
    config.pad_token_id = config.get_text_config().pad_token_id = 0
    model = getattr(transformers, name)._from_config(config, attn_implementation=attention)
    return randomize(model)


def config_of(family, **changes):
    config = copy.deepcopy(make("gemma3-gqa" if family == "multimodal" else family).config)
    for name, value in changes.items():
        setattr(config, name, value)
    if family != "multimodal":
        return config
    return transformers.Gemma3Config(text_config=config.to_dict(), vision_config=VISION)


@torch.no_grad()
def outputs(model, mask=None):
    """Returns the first output (hidden states or logits), without those of padding."""
    ids = prompt().clamp(min=8)
    if mask is not None:
        ids = ids.where(mask.bool(), 0)
    out = model(input_ids=ids, attention_mask=mask)[0]
    return out if mask is None or out.shape[:2] != mask.shape else out[mask.bool()]


RIGHT = torch.tensor([[1] * 20 + [0] * 10, [1] * 30])
MASKS = {"no mask": None, "left": padded(prompt(), 7, 0), "right": RIGHT}


@pytest.mark.parametrize(("name", "family"), MODELS, ids=[name for name, _ in MODELS])
def test_outputs_are_the_same_as_before_acceleration(name, family):
    model = build(name, config_of(family))
    expected = {padding: outputs(model, mask) for padding, mask in MASKS.items()}
    assert accelerate(model, strict=True) is model
    assert {path for path, _ in why(model).values()} == {"reference"}
    for padding in ("no mask", "left"):
        close(outputs(model, MASKS[padding]), expected[padding])
    accelerate(model)
    close(outputs(model, RIGHT), expected["right"])
    restore(model)
    assert torch.equal(outputs(model, RIGHT), expected["right"])


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_paligemma_keeps_its_attention(attention):
    """A model_type of its own contains a decoder of Gemma 1. Its prompt is bidirectional."""
    config = transformers.PaliGemmaConfig(
        text_config=config_of("gemma-mqa").to_dict(), projection_dim=48, hidden_size=48,
        vision_config=VISION | {"num_image_tokens": 16, "vision_use_head": False,
                                "projection_dim": 48}, image_token_id=7,
    )  # fmt: skip
    model, ids = build("PaliGemmaForConditionalGeneration", config, attention), prompt(b=1)
    ids = ids.clamp(min=8)
    ids[0, :16] = 7
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids),
              "pixel_values": torch.randn(1, 3, 8, 8)}  # fmt: skip
    expected = model(**inputs).logits
    text = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    accelerate(model)
    close(model(**inputs).logits, expected)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), text)
    paths = why(model, **inputs)
    assert "bidirectional" in paths["attention"][1] and paths["mlp"][0] == "reference"


def test_decoder_inside_any_module_is_found():
    """As in sentence-transformers, which wraps the model in an nn.Sequential."""
    model = build("Gemma3TextModel", config_of("gemma3-gqa"))
    whole = nn.Sequential(model, nn.Identity())
    accelerate(whole, strict=True)
    assert all(line.path == "reference" for line in explain(model))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", MASKS)
def test_bidirectional_gemma3_keeps_its_attention(attention, padding):
    """EmbeddingGemma: each token sees the tokens before and after it, in layers with a window up to
    the window's size. The kernels are causal, so only norms and MLPs run on them."""
    text = config_of("gemma3-gqa").to_dict() | {"use_bidirectional_attention": True}
    model = build("Gemma3TextModel", transformers.Gemma3TextConfig(**text), attention)
    mask, causal = MASKS[padding], copy.deepcopy(model)
    expected = outputs(model, mask)
    accelerate(model)
    close(outputs(model, mask), expected)
    paths = why(model)
    assert paths["attention"][0] == "transformers" and "bidirectional" in paths["attention"][1]
    assert paths["norm"][0] == paths["mlp"][0] == "reference"
    assert model.config._attn_implementation == attention
    causal.config.use_bidirectional_attention = False
    for layer in causal.layers:
        layer.self_attn.is_causal = True
    assert (outputs(causal, mask) - expected).abs().max() > 0.1, "a causal mask must be detected"


def test_bidirectional_model_is_reported_once_and_refused_if_strict(caplog, monkeypatch):
    text = config_of("gemma3-gqa").to_dict() | {"use_bidirectional_attention": True}
    model = build("Gemma3TextModel", transformers.Gemma3TextConfig(**text))
    with pytest.raises(RuntimeError, match=r"layers\.0\.self_attn.*strict=True.*bidirectional"):
        accelerate(model, strict=True)
    with pytest.raises(ValueError, match=r"no module .* bidirectional"):
        accelerate(model, norm=False, mlp=False)
    assert not any(hasattr(x, "part") for x in model.modules())
    hf_attention.logger.warning_once.cache_clear()
    for logger in (hf_attention.logger, *map(logging.getLogger, ("transformers", "gemma_fast"))):
        monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            outputs(accelerate(model))
    said = [r.getMessage() for r in caplog.records if "gemma_fast" in r.getMessage()]
    assert len(said) == 1 and "leaves 3 of" in said[0] and "bidirectional" in said[0]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("field", ["use_bidirectional_attention", "is_causal"])
def test_model_that_becomes_bidirectional_after_acceleration(attention, field):
    model = build("Gemma3TextModel", config_of("gemma3-gqa"), attention)
    value = field == "use_bidirectional_attention"
    other = copy.deepcopy(model)
    setattr(other.config, field, value)
    accelerate(model)
    setattr(model.config, field, value)
    for mask in MASKS.values():
        close(outputs(model, mask), outputs(other, mask))


def small(**more):
    return {
        "vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 16,
    } | more  # fmt: skip


OTHERS = {
    "Gemma3nForCausalLM": lambda: transformers.Gemma3nTextConfig(),
    "VaultGemmaForCausalLM": lambda: transformers.VaultGemmaConfig(**small()),
    "Qwen3ForCausalLM": lambda: transformers.Qwen3Config(**small()),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_are_refused(name):
    config = OTHERS[name]()
    with torch.device("meta"):
        model = getattr(transformers, name)(config)
    with pytest.raises(
        ValueError,
        match=f"{name} cannot be accelerated: model_type '{config.model_type}', but only "
        r".* Gemma 1 to 4 can .*\. Run this model without accelerate",
    ):
        accelerate(model)


def test_wrapped_and_repeated_decoders_are_refused():
    model = build("Gemma3TextModel", config_of("gemma3-gqa"))
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        with pytest.raises(ValueError, match="call accelerate before it wraps the model"):
            accelerate(wrapped)
    two = nn.ModuleDict({"query": model, "document": copy.deepcopy(model)})
    with pytest.raises(ValueError, match=r"2 Gemma decoders\. Call .* with .*: query, document"):
        accelerate(two)
    accelerate(two["query"], strict=True)
