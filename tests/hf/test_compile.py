"""Checks that an accelerated model compiles without graph breaks, and that it needs no more graphs
than the original model."""

import pytest
import torch
from hf_models import make, padded, prompt
from marks import slow
from tiny_models import close
from transformers import CompileConfig, DynamicCache, StaticCache

from gemma_fast.hf import GemmaFastCache, accelerate


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    return []


def recording_backend(graphs):
    """Returns a backend for torch.compile that records each graph and runs the graph unchanged."""

    def backend(graph, inputs, **options):
        graphs.append(graph)
        return graph.forward

    return backend


def tokens_by_compiled(model, cache, mask_too):
    """Decodes 16 tokens with a compiled forward. Returns them, [b, 16], and the graph count."""
    torch._dynamo.reset()
    graphs, ids, tokens = [], prompt(t=6), []
    forward = torch.compile(model.forward, fullgraph=True, backend=recording_backend(graphs))
    with torch.no_grad():
        token = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        for i in range(16):
            mask = torch.ones(2, 7 + i, dtype=torch.long) if mask_too else None
            out = forward(token, past_key_values=cache, attention_mask=mask)
            token = out.logits[:, -1:].argmax(-1)
            tokens.append(token)
    return torch.cat(tokens, dim=1), len(graphs)


@pytest.mark.parametrize("mask_too", [False, *slow(True)], ids=["no mask", "mask"])
@pytest.mark.parametrize("kind", [GemmaFastCache, *slow(DynamicCache, StaticCache)])
@pytest.mark.parametrize("family", ["gemma3-gqa", *slow("gemma4")])
def test_accelerated_model_compiles_to_no_more_graphs_than_transformers(family, kind, mask_too):
    model = make(family, layers=2)
    model.config._experts_implementation = "batched_mm"  # the eager code does not compile

    def cache(kind):
        if kind is DynamicCache:
            return kind(config=model.config)
        return kind(model.config, 40)

    theirs = StaticCache if kind is GemmaFastCache else kind
    expected, most = tokens_by_compiled(model, cache(theirs), mask_too)
    accelerate(model, strict=not mask_too)
    found, graphs = tokens_by_compiled(model, cache(kind), mask_too)
    assert torch.equal(found, expected) and graphs <= most
    if kind is GemmaFastCache and not mask_too:
        assert graphs == 1 < most


@pytest.mark.parametrize("kept", [3, *slow(0, 1)])
def test_compiled_prompt_gives_the_same_last_logits(graphs, kept):
    """Gemma 4 computes its last layers for the last tokens only."""
    model, ids = make("gemma4"), prompt()
    with torch.no_grad():
        expected = model(ids).logits[:, -kept:]
        accelerate(model, strict=True)
        forward = torch.compile(model.forward, fullgraph=True, backend=recording_backend(graphs))
        for cache in (None, GemmaFastCache(model.config, 40)):
            found = forward(ids, past_key_values=cache, logits_to_keep=kept).logits
            close(found, expected)


@pytest.mark.parametrize("family", ["gemma3-gqa", "gemma4"])
def test_generate_with_rings_compiles_one_graph(family, graphs):
    """By default, `generate` compiles only on a GPU. It creates the masks outside the graph."""
    model, ids = make(family, layers=2), prompt(t=6)
    mask = padded(ids, 2, 0)
    options = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False}
    expected = model.generate(ids, **options)
    accelerate(model, strict=True)
    config = CompileConfig(backend=recording_backend(graphs), fullgraph=True)
    config._compile_all_devices = True  # makes transformers compile on a CPU too
    cache = GemmaFastCache(model.config, 60)
    found = model.generate(ids, past_key_values=cache, compile_config=config, **options)
    assert torch.equal(found, expected) and len(graphs) == 1


@pytest.mark.gpu
def test_generate_on_a_gpu_compiles_automatically():
    """Replays of the CUDA graphs must update counters, rings and lengths correctly."""
    model, ids = make("gemma3-gqa", layers=2).cuda(), prompt(t=6).cuda()
    options = {"attention_mask": padded(ids.cpu(), 2, 0).cuda(), "do_sample": False}
    expected = model.generate(ids, max_new_tokens=40, **options)
    accelerate(model, strict=True)
    cache = GemmaFastCache(model.config, 60)
    for _ in range(2):
        found = model.generate(ids, max_new_tokens=40, past_key_values=cache, **options)
        assert torch.equal(found, expected)
        cache.reset()


def test_rings_refuse_a_mask_with_holes_in_a_compiled_graph(graphs):
    model = accelerate(make("gemma3-gqa", layers=2))
    cache, ids = GemmaFastCache(model.config, 40), prompt(t=6)
    forward = torch.compile(model.forward, fullgraph=True, backend=recording_backend(graphs))
    with torch.no_grad():
        model(ids, past_key_values=cache)
        mask = torch.ones(2, 7, dtype=torch.long)
        mask[0, 3] = 0
        with pytest.raises(RuntimeError, match="a causal mask with padding on the left"):
            forward(ids[:, :1], past_key_values=cache, attention_mask=mask)
