"""Costs of one new token: the time of each step of the reference here, and its bytes on a GPU."""

from __future__ import annotations

import math
import re

from torch import Tensor

from gemma_fast.checkpoint.base import PER_LAYER_EMBEDDING
from gemma_fast.config import GemmaConfig
from gemma_fast.reference import Reference
from gemma_fast.walkthrough.record import Clock

REPEATS = 10
BF16 = 2  # bytes
PER_LAYER, ROUTER, EXPERTS = "per-layer embeddings", "router", "experts"
LONG = 8192  # tokens of the longer context
# Group → names of its steps, or the last part of these names.
GROUPS = {
    "embedding": ("embed",),
    "RMSNorm": (
        "norm", "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
        "post_feedforward_layernorm", "q_norm", "k_norm", "v_norm", "pre_feedforward_layernorm_2",
        "post_feedforward_layernorm_1", "post_feedforward_layernorm_2",
    ),
    "projections of attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mask and rotary embedding": ("mask", "angles", "queries", "keys"),
    "attention": ("scores", "weights", "attend"),
    "projections of the MLP": ("gate_proj", "up_proj", "down_proj"),
    "GeGLU": ("geglu",),
    PER_LAYER: (
        "embed_tokens_per_layer", "per_layer_model_projection", "per_layer_projection_norm",
        "per_layer_inputs", "per_layer_input_gate", "per_layer_geglu", "per_layer_projection",
        "post_per_layer_input_norm",
    ),
    ROUTER: (),  # steps whose names contain ".router."
    EXPERTS: (),  # steps whose names contain ".experts"
    "residual addition": (
        "attention", "mlp", "after_attention", "after_mlp", "after_per_layer", "layer_scalar",
    ),
    "output projection": ("embed_tokens", "lm_head", "logits"),
}  # fmt: skip
EXPERT = re.compile(r"\.experts\.(\d+)\.")
GROUP_OF = {step: group for group, steps in GROUPS.items() for step in steps}


def groups_of(config: GemmaConfig) -> list[str]:
    """Returns the groups whose steps the model has."""
    lacking = set[str]()
    if not config.hidden_size_per_layer_input:
        lacking |= {PER_LAYER}
    if not config.num_experts:
        lacking |= {ROUTER, EXPERTS}
    return [name for name in GROUPS if name not in lacking]


def group_of(name: str) -> str:
    """Returns the group of a step. name: of the step, or of a weight without ".weight" """
    if ".router." in name:
        return ROUTER
    return EXPERTS if ".experts" in name else GROUP_OF[name.rpartition(".")[2]]


def time_of_a_token(
    reference: Reference, token: Tensor, past_key_values: list[tuple[Tensor, Tensor]] | None
) -> dict[str, float]:
    """Returns the milliseconds of each group of steps in one decode step.

    token            [1, 1], the new token
    past_key_values  the KV cache of the prompt

    Each step counts with its fastest time of REPEATS, because other processes slow some of them.
    """
    clock = Clock(reference)
    fastest: dict[str, float] = {}
    for _ in range(REPEATS):
        clock.start()
        clock.forward(token, past_key_values=past_key_values)
        for name, seconds in clock.seconds.items():
            fastest[name] = min(seconds, fastest.get(name, seconds))
    groups = dict.fromkeys(groups_of(reference.config), 0.0)
    for name, seconds in fastest.items():
        groups[group_of(name)] += 1e3 * seconds
    return groups


def long_context(config: GemmaConfig) -> int:
    return min(LONG, config.max_position_embeddings - 1)


def bytes_of_a_token(config: GemmaConfig, past: int) -> dict[str, int]:
    """Returns the bytes that a decode step must read in bf16 after `past` tokens, by group: the
    weights once, but only those of the experts that a token uses; one row of each table of
    embeddings; and the keys and values of the past tokens that the new one sees. Activations are
    left out."""
    groups = dict.fromkeys(groups_of(config), 0)
    for name, shape in config.tensor_shapes().items():
        expert = EXPERT.search(name)
        if expert and int(expert[1]) >= config.top_k_experts:
            continue  # all experts have the same size
        read = shape[1:] if name == PER_LAYER_EMBEDDING else shape  # one row of the table
        groups[group_of(name.removesuffix(".weight"))] += BF16 * math.prod(read)
    if not config.tie_word_embeddings:  # the table of the embedding is not read
        groups["output projection"] -= BF16 * config.vocab_size * config.hidden_size
    groups["embedding"] = BF16 * config.hidden_size
    for layer in config.layers:
        seen = min((layer.window or past + 1) - 1, past)
        groups["attention"] += BF16 * 2 * seen * layer.num_key_value_heads * layer.head_dim
    return groups
