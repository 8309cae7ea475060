"""Compares the costs of a token with hand counts, and checks that every step has a group."""

from dataclasses import replace

import pytest
import torch

from gemma_fast.presets import PRESETS
from gemma_fast.walkthrough import cost
from gemma_fast.walkthrough.cost import (
    EXPERTS,
    PER_LAYER,
    ROUTER,
    bytes_of_a_token,
    groups_of,
    long_context,
    time_of_a_token,
)
from gemma_fast.walkthrough.record import Clock


def test_bytes_of_gemma_2b():
    """Gemma 1 2B: 18 layers, hidden 2048, 8 heads and 1 kv head of 256, MLP 16384, tied table."""
    layers, hidden, heads, mlp = 18, 2048, 8 * 256, 16384
    elements = {
        "embedding": hidden,
        "RMSNorm": layers * 2 * hidden + hidden,
        "projections of attention": layers * (2 * heads * hidden + 2 * 256 * hidden),
        "mask and rotary embedding": 0,
        "attention": layers * 2 * 10 * 256,  # K and V of ten tokens
        "projections of the MLP": layers * 3 * mlp * hidden,
        "GeGLU": 0,
        "residual addition": 0,
        "output projection": 256_000 * hidden,
    }
    found = bytes_of_a_token(PRESETS["gemma-2b"], past=10)
    assert found == {name: 2 * n for name, n in elements.items()}


def test_bytes_of_experts():
    """Gemma 4 26B-A4B: 30 layers; a token uses 8 of 128 experts of 3 * 704 * 2816 weights."""
    found = bytes_of_a_token(PRESETS["gemma-4-26b-a4b"], past=10)
    assert found["experts"] == 2 * 30 * 8 * 3 * 704 * 2816
    assert found["router"] == 2 * 30 * (128 * 2816 + 2816 + 128)
    assert found["projections of the MLP"] == 2 * 30 * 3 * 2112 * 2816


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", list(PRESETS))
def test_all_weights_are_read_once(name, tied):
    """A step reads one row of the embedding, and the experts of the token. A tied table is read as
    the output projection."""
    config = replace(PRESETS[name], tie_word_embeddings=tied)
    table = config.vocab_size * config.hidden_size
    read = config.num_active_parameters - (0 if tied else table) + config.hidden_size
    per_layer = config.num_hidden_layers * config.hidden_size_per_layer_input
    read -= (config.vocab_size - 1) * per_layer  # one row of the per-layer embeddings is read
    for past in (5, 5000):
        cache = sum(
            # A window includes the new token's own key, which is not read.
            (min(config.sliding_window - 1, past) if "sliding" in layer.kind else past)
            * 2 * layer.num_key_value_heads * layer.head_dim
            for layer in config.layers
        )  # fmt: skip
        assert sum(bytes_of_a_token(config, past).values()) == 2 * (read + cache)


def test_long_context_is_not_longer_than_the_model_allows():
    """The new token needs a position, too."""
    assert long_context(PRESETS["gemma-3-1b"]) == 8192
    assert long_context(replace(PRESETS["gemma-2b"], max_position_embeddings=100)) == 99


def test_every_step_has_a_group(twins):
    """A step without a group raises KeyError. Each group of the family has a time."""
    past = twins.reference(twins.prompt(1, 20)).past_key_values
    lengths = [k.shape[2] for k, _ in past]
    found = time_of_a_token(twins.reference, torch.tensor([[5]]), past)
    assert [*found] == groups_of(twins.config)
    assert (PER_LAYER in found) == (twins.config.hidden_size_per_layer_input > 0)
    assert ({ROUTER, EXPERTS} <= found.keys()) == (twins.config.num_experts > 0)
    assert all(ms > 0 for ms in found.values())
    assert [k.shape[2] for k, _ in past] == lengths


class Ticks:
    """Replaces the clock: a second passes between two calls."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1
        return self.now


def test_steps_sum_to_the_whole_time(twins, monkeypatch):
    """Each step gets the time since the previous step, and together they get all of it."""
    ticks = Ticks()
    monkeypatch.setattr("gemma_fast.walkthrough.record.time", ticks)
    clock = Clock(twins.reference)
    for _ in range(2):  # start() forgets the first pass
        clock.start()
        begin = ticks.now
        clock.forward(torch.tensor([[5]]))
    assert set(clock.seconds.values()) == {1.0}
    assert sum(clock.seconds.values()) == ticks.now - begin
    config = twins.config
    expected = 4  # embed, norm, output, logits
    for i, layer in enumerate(config.layers):
        expected += 21 + 2 * config.post_norms + 2 * config.qk_norm + config.v_norm - layer.k_eq_v
        if layer.kv_layer != i:  # k_proj, v_proj, k_norm, v_norm, and the rotated keys
            expected -= 5 - layer.k_eq_v
        expected += config.model_type == "gemma4"  # layer_scalar
        expected += 5 * (config.hidden_size_per_layer_input > 0)
        if config.num_experts:  # router, three norms, four steps of each expert, their sum
            expected += 4 + 3 + 4 * config.top_k_experts + 1
    expected += 3 * (config.hidden_size_per_layer_input > 0)
    assert len(clock.seconds) == expected


def test_each_step_counts_with_its_fastest_time(twins, monkeypatch):
    """In the first of two passes "embed" is fast and "logits" slow, in the second the reverse."""
    passes = iter([{"embed": 1.0, "logits": 5.0}, {"embed": 5.0, "logits": 1.0}])
    monkeypatch.setattr(cost, "REPEATS", 2)
    monkeypatch.setattr(Clock, "forward", lambda self, *_, **__: self.seconds.update(next(passes)))
    found = time_of_a_token(twins.reference, torch.tensor([[5]]), None)
    assert found == dict.fromkeys(groups_of(twins.config), 0) | {
        "embedding": 1000, "output projection": 1000,
    }  # fmt: skip


def test_groups_of_steps(twins, monkeypatch):
    """One step of each group takes another time."""
    seconds = {
        "embed": 1, "model.layers.0.input_layernorm": 2, "model.layers.0.self_attn.q_norm": 3,
        "model.layers.1.self_attn.o_proj": 4, "model.layers.0.mask": 5,
        "model.layers.0.self_attn.queries": 6, "model.layers.0.self_attn.scores": 7,
        "model.layers.0.mlp.down_proj": 8, "model.layers.0.mlp.geglu": 9,
        "model.layers.0.after_mlp": 10, "model.embed_tokens": 11,
    }  # fmt: skip
    per_layer = []
    if twins.config.hidden_size_per_layer_input:
        seconds |= {"per_layer_inputs": 12, "model.layers.1.post_per_layer_input_norm": 13}
        per_layer = [12 + 13]
    experts = []
    if twins.config.num_experts:
        seconds |= {
            "model.layers.0.router.proj": 14, "model.layers.1.router.weights": 15,
            "model.layers.1.router.norm": 16, "model.layers.0.experts.2.down_proj": 17,
            "model.layers.0.experts": 18, "model.layers.0.post_feedforward_layernorm_2": 19,
        }  # fmt: skip
        experts = [14 + 15 + 16, 17 + 18]
    monkeypatch.setattr(Clock, "forward", lambda self, *_, **__: self.seconds.update(seconds))
    found = time_of_a_token(twins.reference, torch.tensor([[5]]), None)
    norms = 2 + 3 + (19 if experts else 0)
    optional = (*per_layer, *experts)
    assert [x / 1000 for x in found.values()] == [1, norms, 4, 5 + 6, 7, 8, 9, *optional, 10, 11]
