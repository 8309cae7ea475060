"""Collects all numbers that the pictures show, as one JSON object (docs/walkthrough.md).

Every number of the model is computed by gemma_fast/reference.py, in one forward pass of the prompt.
Three variants run beside it: without norms, layer 0 without the embedding's factor, and repeated
passes of one token that measure time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from gemma_fast.config import GemmaConfig
from gemma_fast.reference import Reference
from gemma_fast.text.tokenizer import Tokenizer
from gemma_fast.walkthrough.cost import bytes_of_a_token, long_context, time_of_a_token
from gemma_fast.walkthrough.example import mlp_example, rotations, wavelengths
from gemma_fast.walkthrough.record import SHOWN, Recorder, WithoutNorms, WithoutScale

WORDS = ("red", "green", "blue", "London", "Paris", "Tokyo", "pleasant", "vibrant", "with")
SPLIT = ("superlative", "antidisestablishmentarianism", "nvdkjsv")  # examples of long words
PROMPT_WORDS = 15  # the most tokens of the prompt whose embeddings are compared
TOP = 10  # likeliest tokens to show after each token
FORMAT = 1  # of data.json


def encode(tokenizer: Tokenizer, prompt: str, config: GemmaConfig) -> Tensor:
    """Returns the ids of the prompt :: [1, t].

    Raises ValueError if they do not fit the context, or the model's vocabulary lacks one of them.
    """
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    if ids.shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"the prompt has {ids.shape[1]} tokens; the model's context has"
            f" {config.max_position_embeddings}"
        )
    if int(ids.max()) >= config.vocab_size:
        raise ValueError(
            f"token id {int(ids.max())} of {tokenizer.source} is outside of the model's vocabulary"
            f" of {config.vocab_size}"
        )
    return ids


@torch.no_grad()
def collect(
    reference: Reference,
    tokenizer: Tokenizer,
    ids: Tensor,
    words: Sequence[str] = WORDS,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Returns the numbers of all pictures.

    ids       [1, t], from `encode`
    words     words whose embeddings are compared, besides the tokens of the prompt
    progress  is called with the name of each part before it is computed
    """
    config, device = reference.config, reference.weights["model.norm.weight"].device
    ids = ids.to(device)
    t = ids.shape[1]
    progress("Running the model")
    run = Recorder(reference)
    out = run(ids, logits_to_keep=min(t, SHOWN))
    progress("Running it without norms")
    bare = WithoutNorms(reference)
    bare(ids, use_cache=False, logits_to_keep=1)
    progress("Measuring time")
    time = time_of_a_token(reference, out.logits[:, -1:].argmax(-1), out.past_key_values)
    data = {
        "format": FORMAT,
        "model": {
            "config": asdict(config)
            | {name: getattr(config, name)._asdict() for name in ("full_rope", "sliding_rope")},
            "parameters": config.num_parameters,
            "dtype": str(reference.weights["model.norm.weight"].dtype).removeprefix("torch."),
            "device": str(device),
        },
        "tokens": _tokens(tokenizer, ids[0].tolist(), config),
        "similarity": _similarity(reference, tokenizer, words, ids[0].tolist()),
        "embedding_scale": _embedding_scale(reference, run, ids),
        "updates": _updates(run),
        "hiddens": _hiddens(run, bare),
        "attention": _attention(run, t),
        "rotary": {
            "rotations": rotations(config),
            "wavelengths": wavelengths(config),
            "query_lengths": _query_lengths(run),
        },
        "mlp": mlp_example(),
        "final_norm": {
            "before": _of_layer(run, config.num_hidden_layers - 1, "after_mlp")[1],
            "after": run.seen["model.norm"],
        },
        "predictions": _predictions(tokenizer, ids[0, -SHOWN:].tolist(), out.logits[0]),
        "own": _own(run, out.logits),
        "cost": {
            "time": time,
            "bytes": bytes_of_a_token(config, t),
            "long_context": long_context(config),
        },
    }
    return rounded(data)


def rounded(x: Any) -> Any:
    """Returns x with each float rounded to 5 significant digits. Infinity and NaN, which JSON does
    not have, become None."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [rounded(value) for value in x]
    if isinstance(x, float):
        return float(f"{x:.5g}") if math.isfinite(x) else None
    return x


def visible(token: str) -> str:
    """Returns the token with ↵ for a line break and an escape for each unprintable character."""
    text = token.replace("\n", "↵")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _names(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Returns the names of the tokens, with ▁ for a space."""
    named: list[Any] = tokenizer.convert_ids_to_tokens([*ids])
    return [
        visible(name) if name is not None else f"<{i}>" for name, i in zip(named, ids, strict=True)
    ]


def _tokens(tokenizer: Tokenizer, ids: list[int], config: GemmaConfig) -> dict[str, Any]:
    splits = {word: tokenizer.encode(f" {word}", add_special_tokens=False) for word in SPLIT}
    return {
        "ids": ids,
        "names": _names(tokenizer, ids),
        "shown": min(len(ids), SHOWN),  # number of last tokens in the pictures
        "vocab_size": config.vocab_size,
        "splits": {word: _names(tokenizer, found) for word, found in splits.items()},
    }


def _similarity(
    reference: Reference, tokenizer: Tokenizer, words: Sequence[str], prompt: list[int]
) -> dict[str, Any]:
    """Returns the cosines between the embeddings of the words and of the prompt's first tokens. A
    word that is not one token, with a space before it, is listed in `left_out`."""
    chosen: list[int] = []
    left_out = {}
    for word in words:
        found = tokenizer.encode(f" {word}", add_special_tokens=False)
        if len(found) == 1:
            chosen += found
        else:
            left_out[word] = _names(tokenizer, found)
    special = {*tokenizer.all_special_ids}
    chosen += [i for i in dict.fromkeys(prompt) if i not in special][:PROMPT_WORDS]
    chosen = [*dict.fromkeys(chosen)]
    rows = reference.weights["model.embed_tokens.weight"][chosen].double()
    rows = rows / rows.norm(dim=-1, keepdim=True)
    return {
        "names": _names(tokenizer, chosen), "cosines": (rows @ rows.T).tolist(),
        "left_out": left_out,
    }  # fmt: skip


def _embedding_scale(reference: Reference, run: Recorder, ids: Tensor) -> dict[str, Any]:
    """Returns scales of the embedding and of layer 0's attention, with and without the factor."""
    kinds = reference.config.layer_types
    without = WithoutScale(reference, num_hidden_layers=1, layer_types=kinds[:1])
    without(ids, use_cache=False, logits_to_keep=1)
    scales = {
        name: (x.seen["embed"], _of_layer(x, 0, "attention"))
        for name, x in (("with_factor", run), ("without_factor", without))
    }
    return {
        name: {"embedding": skip, "attention": update, "update_scale": _update_scale(update, skip)}
        for name, (skip, update) in scales.items()
    } | {"factor": reference.config.hidden_size**0.5}


def _update_scale(update: float, skip: float) -> float:
    """Returns √(σr² / (σr² + σs²)): 0 if the update changes nothing, 1 if it replaces the skip."""
    return update / math.hypot(update, skip)


def _of_layer(run: Recorder, layer: int, step: str) -> Any:
    return run.seen[f"model.layers.{layer}.{step}"]


def _layers(run: Recorder) -> range:
    return range(run.config.num_hidden_layers)


def _updates(run: Recorder) -> dict[str, list[float]]:
    """Returns the update scales of attention and MLP by layer."""
    skip = run.seen["embed"]
    found: dict[str, list[float]] = {"attention": [], "mlp": []}
    for i in _layers(run):
        for name in found:
            found[name].append(_update_scale(_of_layer(run, i, name), skip))
            skip, _ = _of_layer(run, i, f"after_{name}")
    return found


def _hiddens(run: Recorder, bare: Recorder) -> dict[str, Any]:
    """Returns the scale of the residual stream after the embedding, after the attention of layer 0,
    after its MLP, and so on."""
    steps = [f"model.layers.{i}.after_{x}" for i in _layers(run) for x in ("attention", "mlp")]
    return {
        "with_norms": [run.seen["embed"], *(run.seen[step][0] for step in steps)],
        "without_norms": [bare.seen["embed"], *(bare.seen[step] for step in steps)],
    }


def _attention(run: Recorder, t: int) -> dict[str, Any]:
    """Returns the attention weights of the last of t tokens, the flatness of the heads, and the
    head to enlarge."""
    maps = torch.stack([_of_layer(run, i, "self_attn.weights") for i in _layers(run)])
    flat = [_of_layer(run, i, "self_attn.flatness") for i in _layers(run)]
    position = torch.arange(t)[-SHOWN:]
    elsewhere = (position > 0) & (position < position[:, None])  # neither the first key nor its own
    layer, head = divmod(int((maps * elsewhere).sum((2, 3)).argmax()), maps.shape[1])
    return {
        "maps": [[[[round(w, 4) for w in t] for t in head] for head in x] for x in maps.tolist()],
        "flatness": flat,
        "order": torch.tensor(flat).argsort(dim=1, descending=True).tolist(),
        "enlarged": {"layer": layer, "head": head},
    }


def _query_lengths(run: Recorder) -> list[dict[str, Any]]:
    """Returns the lengths of the queries' channel pairs in the first layer and the last one, and in
    the first one of the other type if the model has two."""
    kinds = run.config.layer_types
    layers = {0, len(kinds) - 1, *(kinds.index(kind) for kind in kinds)}
    lengths = {i: _of_layer(run, i, "self_attn.queries") for i in sorted(layers)}
    return [{"layer": i, "type": kinds[i], "lengths": x} for i, x in lengths.items()]


def _predictions(tokenizer: Tokenizer, ids: list[int], logits: Tensor) -> list[dict[str, Any]]:
    """Returns the likeliest tokens after each of the last tokens. logits :: [t, vocab]"""
    best = logits.float().softmax(-1).topk(min(TOP, logits.shape[-1]))
    return [
        {
            "token": name,
            "next": [
                {"token": token, "id": i, "probability": p}
                for token, i, p in zip(_names(tokenizer, after), after, probabilities, strict=True)
            ],
        }
        for name, after, probabilities in zip(
            _names(tokenizer, ids), best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]


def _own(run: Recorder, logits: Tensor) -> dict[str, Any]:
    """Returns what only some models have: windows, soft caps, norms of q and k, norms after
    attention and MLP."""
    config, layers = run.config, _layers(run)
    context = config.max_position_embeddings
    own: dict[str, Any] = {"keys_seen": [min(config.window(i) or context, context) for i in layers]}
    if config.attn_logit_softcapping:
        own["largest_scores"] = [_of_layer(run, i, "self_attn.scores") for i in layers]
    if config.final_logit_softcapping:
        head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        own["largest_logit"] = {
            "before": run.seen[head], "after": float(logits.abs().max())
        }  # fmt: skip
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
