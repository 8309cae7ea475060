"""Computes the figures of the steps from what `Recorder` has seen: scales, maps, norms, caps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemma_fast.config import SLIDING
from gemma_fast.reference import Reference
from gemma_fast.walkthrough.record import SHOWN, Recorder, WithoutFactor, largest


def embedding_scale(reference: Reference, run: Recorder, ids: Tensor) -> dict[str, Any]:
    """Returns the standard deviations of the embedding and of layer 0's updates, with and without
    the factor. ids :: [1, t]"""
    kinds = reference.config.layer_types
    without = WithoutFactor(reference, num_hidden_layers=1, layer_types=kinds[:1])
    without(ids, use_cache=False, logits_to_keep=1)
    return {
        name: {
            "embedding": x.seen["embed"],
            "attention": _of_layer(x, 0, "attention"),
            "mlp": _of_layer(x, 0, "mlp"),
        }
        for name, x in (("with_factor", run), ("without_factor", without))
    } | {"factor": reference.config.hidden_size**0.5}


def _update_scale(update: float, skip: float) -> float:
    """Returns √(σr² / (σr² + σs²)), where σr is that of the update and σs that of the stream."""
    return update / math.hypot(update, skip) if update else 0.0


def _of_layer(run: Recorder, layer: int, step: str) -> Any:
    return run.seen[f"model.layers.{layer}.{step}"]


def _layers(run: Recorder) -> range:
    return range(run.config.num_hidden_layers)


def updates(run: Recorder) -> dict[str, list[float]]:
    """Returns the update scales of attention and MLP :: [layers] each."""
    skip = run.seen["embed"]
    found: dict[str, list[float]] = {"attention": [], "mlp": []}
    for i in _layers(run):
        for name in found:
            found[name].append(_update_scale(_of_layer(run, i, name), skip))
            skip = _of_layer(run, i, f"after_{name}")
    return found


def hiddens(run: Recorder, bare: Recorder) -> dict[str, Any]:
    """Returns the standard deviation of the residual stream after the embedding, after the
    attention of layer 0, after its MLP, and so on :: [1 + 2 * layers] each. bare: a run without
    norms.
    """
    steps = [f"model.layers.{i}.after_{x}" for i in _layers(run) for x in ("attention", "mlp")]
    return {
        "with_norms": [run.seen["embed"], *(run.seen[step] for step in steps)],
        "without_norms": [bare.seen["embed"], *(bare.seen[step] for step in steps)],
    }


def attention(run: Recorder, t: int) -> dict[str, Any]:
    """Returns the attention weights of the last of t tokens :: [layers, heads, shown, shown], None
    where a query does not see the key; flatness and order of the heads :: [layers, heads]; and the
    head to enlarge."""
    maps = torch.stack([_of_layer(run, i, "self_attn.weights") for i in _layers(run)]).double()
    flat = torch.tensor([_of_layer(run, i, "self_attn.flatness") for i in _layers(run)])
    position = torch.arange(t)[-SHOWN:]
    elsewhere = (position > 0) & (position < position[:, None])  # neither the first key nor its own
    sums = maps.nan_to_num().mul(elsewhere).sum((2, 3))
    layer, head = divmod(int(sums.argmax()), maps.shape[1])
    shown = (maps * 1e4).round().div(1e4).numpy()  # 4 decimals keep the file small
    return {
        "maps": np.where(np.isnan(shown), np.array(None), shown).tolist(),
        "flatness": flat.tolist(),
        "order": flat.argsort(dim=1, descending=True).tolist(),
        "enlarged": {"layer": layer, "head": head},
    }


def query_lengths(run: Recorder) -> list[dict[str, Any]]:
    """Returns the lengths of the queries' channel pairs :: [heads, d / 2] in the first layer, the
    last layer, and the first layer of each type."""
    kinds = run.config.layer_types
    layers = {0, len(kinds) - 1, *(kinds.index(kind) for kind in kinds)}
    lengths = {i: _of_layer(run, i, "self_attn.queries") for i in sorted(layers)}
    return [{"layer": i, "type": kinds[i], "lengths": x} for i, x in lengths.items()]


def parts_of_some_models(run: Recorder, logits: Tensor) -> dict[str, Any]:
    """Returns what only some models have: windows, soft caps, norms of q and k, norms after
    attention and MLP."""
    config, layers = run.config, _layers(run)
    own: dict[str, Any] = {}
    if SLIDING in config.layer_types:
        context = config.max_position_embeddings
        own["keys_seen"] = [min(config.window(i) or context, context) for i in layers]
    if config.attn_logit_softcapping:
        own["largest_scores"] = [_of_layer(run, i, "self_attn.scores") for i in layers]
    if config.final_logit_softcapping:
        head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        own["largest_logit"] = {"before": run.seen[head], "after": largest(logits)}
    if config.qk_norm:
        own["qk_norm"] = {
            f"{x}_{when}": [_of_layer(run, i, f"self_attn.{x}_{step}") for i in layers]
            for x in "qk"
            for when, step in (("before", "proj"), ("after", "norm"))
        }
    if config.post_norms:
        parts = (("attention", "self_attn.o_proj"), ("mlp", "mlp.down_proj"))
        own["post_norms"] = {
            f"{name}_{when}": [_of_layer(run, i, step) for i in layers]
            for name, last in parts
            for when, step in (("before", last), ("after", name))
        }
    return own
