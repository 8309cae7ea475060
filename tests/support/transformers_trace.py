"""Records what transformers' modules compute in one forward pass, as the truth for the figures of a
walk-through. Uses no code of gemma_fast."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch import Tensor, nn


@dataclass
class Trace:
    """Inputs and outputs of all modules, by their names, and the arguments of each attention.

    scores [i] :: [heads, t, s], before the soft cap; visible [i] :: [t, s], bool, from the mask
    that transformers passed; queries [i] :: [heads, t, d], rotated; attentions [i] :: [heads, t, s]
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    scores: list[Tensor] = field(default_factory=list)
    visible: list[Tensor] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)
    attentions: list[Tensor] = field(default_factory=list)
    logits: Tensor | None = None

    def updates(self, i: int) -> dict[str, Tensor]:
        """Returns what layer i adds to the residual stream: after attention, after the MLP, and
        from the per-layer embeddings if the model has them."""
        layer = f"model.layers.{i}"
        if f"{layer}.post_feedforward_layernorm" in self.outputs:
            names = ("post_attention_layernorm", "post_feedforward_layernorm")
        else:  # Gemma 1 normalizes no updates
            names = ("self_attn", "mlp")
        if f"{layer}.post_per_layer_input_norm" in self.outputs:
            names += ("post_per_layer_input_norm",)
        return {
            key: self.outputs[f"{layer}.{name}"]
            for key, name in zip(("attention", "mlp", "per_layer"), names, strict=False)
        }

    def stream(self, layers: int) -> list[Tensor]:
        """Returns the residual stream before each attention and each MLP, and before model.norm."""
        found = []
        for i in range(layers):
            layer = f"model.layers.{i}"
            post = f"{layer}.post_feedforward_layernorm" in self.outputs
            before_mlp = "pre_feedforward_layernorm" if post else "post_attention_layernorm"
            found += [self.inputs[layer], self.inputs[f"{layer}.{before_mlp}"]]
        return [*found, self.inputs["model.norm"]]


@torch.no_grad()
def trace(hf: nn.Module, ids: Tensor) -> Trace:
    """Runs a model with eager attention on ids :: [1, t]."""
    found = Trace()

    def record(name: str):
        def hook(module, args, kwargs, output):
            found.inputs[name] = args[0] if args else kwargs.get("hidden_states")
            found.outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    modeling = sys.modules[type(hf).__module__]
    original = modeling.eager_attention_forward

    def attention(module, query, key, value, mask, *args, **kwargs):
        out, weights = original(module, query, key, value, mask, *args, **kwargs)
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        found.scores.append((query @ keys.mT * kwargs["scaling"])[0])
        found.visible.append(mask[0, 0] == 0)
        found.queries.append(query[0])
        found.attentions.append(weights[0])
        return out, weights

    hooks = [
        module.register_forward_hook(record(name), with_kwargs=True)
        for name, module in hf.named_modules()
        if name not in ("", "model")
    ]
    try:
        with patch.object(modeling, "eager_attention_forward", attention):
            found.logits = hf(input_ids=ids, use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    return found


def without_norms(hf: nn.Module) -> nn.Module:
    """Returns a copy of the model whose norms return their input."""
    bare = copy.deepcopy(hf)
    for name, module in [*bare.named_modules()]:
        if "RMSNorm" in type(module).__name__:
            bare.set_submodule(name, nn.Identity())
    return bare


def without_factor(hf: nn.Module) -> nn.Module:
    """Returns a copy of the model whose embeddings are divided by √hidden, so that the factor
    cancels. The copy's logits have no meaning."""
    small = copy.deepcopy(hf)
    embeddings = small.get_input_embeddings().weight
    embeddings.data = embeddings.data / embeddings.shape[1] ** 0.5
    return small
