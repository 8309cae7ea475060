"""Computes the figures of the steps from what `Recorder` has seen: scales, maps, norms, caps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemma_fast.config import SLIDING, GemmaConfig
from gemma_fast.reference import Reference
from gemma_fast.walkthrough.record import BEFORE_NORM, SHOWN, Recorder, WithoutFactor, largest

# Update of the stream → steps that compute it: the last one before a norm, the update, the sum.
UPDATES = {
    "attention": ("self_attn.o_proj", "attention", "after_attention"),
    "mlp": (BEFORE_NORM, "mlp", "after_mlp"),
    "per_layer": ("per_layer_projection", "post_per_layer_input_norm", "after_per_layer"),
}


def embedding_scale(reference: Reference, run: Recorder, ids: Tensor) -> dict[str, Any]:
    """Returns the standard deviations of the embedding and of layer 0's updates, with and without
    the factor. ids :: [1, t]"""
    kinds = reference.config.layer_types
    without = WithoutFactor(
        reference, num_hidden_layers=1, layer_types=kinds[:1], num_kv_shared_layers=0
    )
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


def _updates_of(config: GemmaConfig) -> list[str]:
    """Returns the names of the updates in each layer of the model."""
    return [name for name in UPDATES if name != "per_layer" or config.hidden_size_per_layer_input]


def _after_layer(run: Recorder, layer: int) -> float:
    """Returns the standard deviation of the stream at the end of a layer, after its last step."""
    if (scaled := run.seen.get(f"model.layers.{layer}.layer_scalar")) is not None:
        return scaled
    return _of_layer(run, layer, UPDATES[_updates_of(run.config)[-1]][2])


def updates(run: Recorder) -> dict[str, list[float]]:
    """Returns the scales of each update, for example those of attention and MLP :: [layers]."""
    skip = run.seen["embed"]
    found: dict[str, list[float]] = {name: [] for name in _updates_of(run.config)}
    for i in _layers(run):
        for name, scales in found.items():
            _, update, after = UPDATES[name]
            scales.append(_update_scale(_of_layer(run, i, update), skip))
            skip = _of_layer(run, i, after)
        skip = _after_layer(run, i)
    return found


def hiddens(run: Recorder, bare: Recorder) -> dict[str, Any]:
    """Returns the standard deviation of the residual stream after the embedding, after the
    attention of layer 0, at the end of layer 0, and so on :: [1 + 2 * layers] each. bare: a run
    without norms.
    """
    found = {}
    for name, x in (("with_norms", run), ("without_norms", bare)):
        found[name] = [x.seen["embed"]]
        for i in _layers(run):
            found[name] += [_of_layer(x, i, "after_attention"), _after_layer(x, i)]
    return found


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
    """Returns what only some models have: windows, soft caps, norms of heads and of updates, shared
    keys and values, per-layer embeddings, experts, scalars of layers."""
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
        own["qk_norm"] = _norms_of_heads(run)
    if config.post_norms:
        own["post_norms"] = {
            f"{name}_{when}": [_of_layer(run, i, step) for i in layers]
            for name in _updates_of(config)
            for when, step in zip(("before", "after"), UPDATES[name], strict=False)
        }
    if config.num_kv_shared_layers:
        own["kv_layers"] = [layer.kv_layer for layer in config.layers]
    if config.hidden_size_per_layer_input:
        own["per_layer"] = {
            "inputs": run.seen["per_layer_inputs"],
            "gated": [_of_layer(run, i, "per_layer_geglu") for i in layers],
            "open_gates": [_of_layer(run, i, "per_layer_input_gate") for i in layers],
        }
    if config.num_experts:
        own["experts"] = {
            name: [_of_layer(run, i, f"router.{name}") for i in layers]
            for name in ("chosen", "weights")
        }
    names = [f"model.layers.{i}.layer_scalar" for i in layers]
    if scalars := [float(run.weights[name]) for name in names if name in run.weights]:
        own["layer_scalars"] = scalars
    return own


def _norms_of_heads(run: Recorder) -> dict[str, list[float | None]]:
    """Returns the RMS of queries, keys and (if the model normalizes them) values before and after
    their norm :: [layers] each, None where the layer reads an earlier layer's keys and values."""
    found: dict[str, list[float | None]] = {}
    for x in "qkv" if run.config.v_norm else "qk":
        before, after = found[f"{x}_before"], found[f"{x}_after"] = [], []
        for i, layer in enumerate(run.config.layers):
            own = x == "q" or layer.kv_layer == i
            projection = "k" if x == "v" and layer.k_eq_v else x
            before.append(_of_layer(run, i, f"self_attn.{projection}_proj") if own else None)
            after.append(_of_layer(run, i, f"self_attn.{x}_norm") if own else None)
    return found
