"""Checks what is new in Gemma 4: K = V with fewer heads, layers that share keys and values,
per-layer embeddings. Other tests of this folder run on a model that has all of them, and experts.
test_experts.py has the tests of experts."""

import copy

import pytest
import torch
import transformers
from hf_models import (
    GEMMA4,
    RENAMED,
    generate,
    logits,
    make,
    padded,
    prompt,
    why,
)
from marks import slow
from tiny_models import close, randomize
from transformers import DynamicCache, StaticCache
from triton_interpreter import interpreter

from gemma_fast.hf import GemmaFastCache, accelerate, explain, restore

# Whether transformers computes the shared layers for the last `logits_to_keep` tokens only.
SLICES = hasattr(transformers.Gemma4TextModel, "_maybe_slice_kv_shared_inputs")
CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(model.config, 60),
    "rings": lambda model: GemmaFastCache(model.config, 60),
}


def keywords(cache):
    return {"cache" if RENAMED else "past_key_values": cache}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", GEMMA4)
def test_logits_are_the_same_as_before_acceleration(family, attention):
    model, ids = make(family, attention), prompt(t=40)
    mask = padded(ids, 17, 0)
    real = mask.bool()
    expected = logits(model, ids), logits(model, ids, mask)[real]
    accelerate(model, strict=True)
    close(logits(model, ids), expected[0])
    close(logits(model, ids, mask)[real], expected[1])
    assert {line.path for line in explain(model) if line.part != "experts"} == {"reference"}
    assert torch.equal(logits(restore(model), ids), expected[0])


@pytest.mark.parametrize("family", ["gemma4", *slow("gemma4-k-is-v", "gemma4-shared")])
def test_triton_kernels_give_the_same_logits_as_transformers(family):
    """Runs a prompt, of which the shared layers see the last token only, and then decode steps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, ids = make(family).to(device), prompt(t=18).to(device)
    mask = padded(ids.cpu(), 5, 0).to(device)
    expected = logits(model, ids, mask)[:, 14:]
    accelerate(model, strict=True)
    cache = DynamicCache(config=model.config)
    with interpreter():
        found = [
            logits(model, ids[:, i:end], mask[:, :end], logits_to_keep=1, **keywords(cache))
            for i, end in ((0, 15), (15, 16), (16, 17), (17, 18))
        ]
    close(torch.cat(found, dim=1), expected)


@pytest.mark.parametrize("kept", [0, 1, 3])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", [0, 17])
@pytest.mark.parametrize("family", ["gemma4", "gemma4-k-is-v"])
def test_logits_to_keep_gives_the_last_logits_of_each_chunk(
    family, padding, attention, cache, kept
):
    """The text is several windows long. transformers slices the masks of layers that share keys and
    values, so the positions of the queries must be sliced with them."""
    model, ids = make(family, attention), prompt(t=60)
    mask = padded(ids, padding, 0)
    expected, rows = logits(model, ids, mask), []
    accelerate(model, strict=True)
    state = keywords(CACHES[cache](model))
    model.model.layers[-1].register_forward_hook(lambda layer, args, x: rows.append(x.shape[1]))
    for start, end in ((0, 20), (20, 27), (27, 59), (59, 60)):
        seen = mask[:, :end] if padding else None
        found = logits(model, ids[:, start:end], seen, logits_to_keep=kept, **state)
        first = max(end - kept, start) if kept else start
        real = mask[:, first:end].bool()
        close(found[real], expected[:, first:end][real])
        sliced = SLICES and kept and family == "gemma4"
        assert rows[-1] == end - (first if sliced else start)


def test_logits_to_keep_without_a_mask_is_refused_for_sdpa():
    """sdpa without a mask would take the last queries for the first ones."""
    if not SLICES:
        pytest.skip("transformers 5.17 computes all layers for all tokens")
    model, ids = make("gemma4", "sdpa"), prompt(t=9)  # shorter than the window
    masks = dict.fromkeys(("full_attention", "sliding_attention"))
    expected = logits(model, ids, masks, logits_to_keep=3)
    accelerate(model)
    close(logits(model, ids, masks), logits(model, ids))
    with pytest.raises(ValueError, match=r"logits_to_keep with an attention_mask of None: pass"):
        logits(model, ids, masks, logits_to_keep=3)
    close(logits(model, ids, logits_to_keep=3), expected)


@torch.no_grad()
def test_mask_with_holes_and_logits_to_keep_falls_back():
    model, ids = make("gemma4", "sdpa"), prompt()
    mask = torch.ones_like(ids)
    mask[0, 9:12] = 0
    expected = logits(model, ids, mask, logits_to_keep=3)
    close(logits(accelerate(model), ids, mask, logits_to_keep=3), expected)
    path, reason = why(model, input_ids=ids, attention_mask=mask)["attention"]
    assert path == "transformers" and "hides more than causality" in reason


def test_short_cache_without_rings_falls_back_on_a_mask_with_holes():
    """In transformers 5.17, layers that share keys and values have no layer in the cache."""
    model, ids = make("gemma4"), prompt(t=9)
    mask = torch.ones_like(ids)
    mask[0, 4] = 0
    expected = logits(model, ids, mask)
    accelerate(model)
    cache = GemmaFastCache(model.config, 10)
    close(logits(model, ids, mask, **keywords(cache)), expected)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", GEMMA4)
def test_generate_past_the_window_gives_the_same_tokens(family, cache):
    model, ids = make(family), prompt(t=20)
    mask = padded(ids, 6, 0)
    expected = generate(model, ids, mask)
    accelerate(model, strict=True)
    assert torch.equal(generate(model, ids, mask, past_key_values=CACHES[cache](model)), expected)


def test_explain_lists_the_modules_of_each_layer():
    """Layers that share keys and values have no norm of keys and values, and no k_proj. The norm of
    values has no weight."""
    lines = {
        line.module.removeprefix("model."): line for line in explain(accelerate(make("gemma4")))
    }
    norms = {name: line.part for name, line in lines.items() if "self_attn" in name}
    own = ["self_attn", "self_attn.q_norm", "self_attn.k_norm", "self_attn.v_norm"]
    names = [(i, name) for i in range(4) for name in (own if i < 2 else own[:2])]
    assert norms == {
        f"layers.{i}.{name}": "norm" if "norm" in name else "attention" for i, name in names
    }
    assert {lines[f"layers.{i}.mlp"].part for i in range(4)} == {"mlp"}
    for name in ("per_layer_projection_norm", "layers.3.post_per_layer_input_norm"):
        assert lines[name].part == "norm"
    for part in ("router", "experts"):
        found = [name for name, line in lines.items() if line.part == part]
        assert found == [f"layers.{i}.{part}" for i in range(4)]
    assert "layers.0.router.norm" not in lines  # belongs to the router
    assert all(line.path == "reference" for line in lines.values())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bidirectional_model_keeps_its_attention(attention):
    config = copy.deepcopy(GEMMA4["gemma4-per-layer"]) | {"use_bidirectional_attention": "all"}
    model = make("gemma4-per-layer", attention)
    other = (
        type(model)
        ._from_config(transformers.Gemma4TextConfig(**config), attn_implementation=attention)
        .eval()
    )
    other.load_state_dict(model.state_dict())
    ids = prompt()
    for mask in (None, padded(ids, 7, 0)):
        real = slice(None) if mask is None else mask.bool()
        expected = logits(restore(other), ids, mask)
        close(logits(accelerate(other), ids, mask)[real], expected[real])
        assert (logits(model, ids, mask) - expected)[real].abs().max() > 0.1
    assert "bidirectional" in why(other)["attention"][1]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_assistant_gives_the_same_tokens(attention):
    """Its layers read keys and values of the model, and its mask is not causal."""
    model, ids = make("gemma4-k-is-v", attention), prompt(b=1)
    config = copy.deepcopy(GEMMA4["gemma4-k-is-v"]) | {
        "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 4,
    }  # fmt: skip
    config = transformers.Gemma4AssistantConfig(
        text_config=transformers.Gemma4TextConfig(**config), backbone_hidden_size=48
    )
    assistant = randomize(
        transformers.Gemma4AssistantForCausalLM._from_config(config, attn_implementation=attention)
    )
    assistant.generation_config.num_assistant_tokens = 3
    expected = generate(model, ids, assistant_model=assistant)
    accelerate(model, strict=True)
    accelerate(assistant)
    assert torch.equal(generate(model, ids, assistant_model=assistant), expected)
    runs = {(x.part, x.run.path) for x in assistant.modules() if getattr(x, "run", None)}
    assert runs == {("norm", "reference"), ("mlp", "reference"), ("attention", "transformers")}


@torch.no_grad()
def test_keywords_for_other_code_do_not_stop_the_kernels():
    """transformers passes these keywords on to each layer's attention."""
    model, ids = make("gemma4-experts"), prompt()
    given = {"labels": ids, "output_router_logits": True, "return_shared_kv_states": True}
    expected = model(ids, **given)
    found = accelerate(model, strict=True)(ids, **given)
    close(found.loss, expected.loss)
    assert found.shared_kv_states.keys() == expected.shared_kv_states.keys()
    if SLICES:
        assert len(found.router_logits) == len(expected.router_logits) == 4
