"""Collects all numbers that the pictures show, as one JSON object (docs/walkthrough.md).

gemma_fast/reference.py computes the results of the steps, in one forward pass of the prompt.
Further runs: without norms, layer 0 without the embedding's factor, and passes of one new token
that measure time. Cosines come from the embedding table, bytes from the config.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from gemma_fast.config import GemmaConfig
from gemma_fast.reference import Output, Reference
from gemma_fast.text.tokenizer import Tokenizer
from gemma_fast.walkthrough import steps
from gemma_fast.walkthrough.cost import bytes_of_a_token, long_context, time_of_a_token
from gemma_fast.walkthrough.example import mlp_example, rotations, wavelengths
from gemma_fast.walkthrough.record import SHOWN, Recorder, WithoutNorms

WORDS = (
    "yellow", "orange", "purple", "Berlin", "Rome", "Cairo", "gentle", "bitter", "proud", "during",
)  # fmt: skip
SPLIT = ("photosynthesis", "electroencephalography", "qwertzuiop")  # examples of words
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
    config, t = reference.config, ids.shape[1]
    ids = ids.to(reference.weights["model.norm.weight"].device)
    progress("Running the model")
    run = Recorder(reference)
    out = run(ids, logits_to_keep=min(t, SHOWN))
    if not out.logits.isfinite().all():
        raise ValueError(f"the logits are not finite in {out.logits.dtype}: try --dtype float32")
    progress("Running it without norms")
    bare = WithoutNorms(reference)
    bare(ids, use_cache=False, logits_to_keep=1)
    data = {
        "tokens": _tokens(tokenizer, ids[0].tolist(), config),
        "similarity": _similarity(reference, tokenizer, words, ids[0].tolist()),
        "embedding_scale": steps.embedding_scale(reference, run, ids),
        "updates": steps.updates(run),
        "hiddens": steps.hiddens(run, bare),
        "rotary": {
            "rotations": rotations(config),
            "wavelengths": wavelengths(config),
            "query_lengths": steps.query_lengths(run),
        },
        "mlp": mlp_example(),
        "final_norm": run.seen["final_norm"],
        "predictions": _predictions(tokenizer, ids[0, -SHOWN:].tolist(), out.logits[0]),
        "own": steps.parts_of_some_models(run, out.logits),
    }
    progress("Measuring time")
    data["cost"] = _cost(reference, out)
    attention = steps.attention(run, t)
    attention["flatness"] = rounded(attention["flatness"])
    return {"format": FORMAT, "model": _model(reference), "attention": attention, **rounded(data)}


def _cost(reference: Reference, out: Output) -> dict[str, Any]:
    """Returns the costs of a token. out: the reference's output for the prompt."""
    config, token = reference.config, out.logits[:, -1:].argmax(-1)
    past = out.past_key_values or []
    prompt, long = past[0][0].shape[2], long_context(config)
    return {
        "time": time_of_a_token(reference, token, past),
        "bytes": {
            "prompt": bytes_of_a_token(config, prompt), "long": bytes_of_a_token(config, long)
        },
        "long_context": long,
    }  # fmt: skip


def _model(reference: Reference) -> dict[str, Any]:
    config, weight = reference.config, reference.weights["model.norm.weight"]
    ropes = {name: getattr(config, name)._asdict() for name in ("full_rope", "sliding_rope")}
    return {
        "config": asdict(config) | ropes,
        "layers": [layer._asdict() for layer in config.layers],
        "norm_offset": config.norm_offset,
        "parameters": config.num_parameters,
        "active_parameters": config.num_active_parameters,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": str(weight.device),
    }


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
    chosen = [*dict.fromkeys(chosen)] or prompt[:1]
    rows = reference.weights["model.embed_tokens.weight"][chosen].double()
    directions = torch.nn.functional.normalize(rows, dim=-1)
    cosines = (directions @ directions.T).tolist()
    return {"names": _names(tokenizer, chosen), "cosines": cosines, "left_out": left_out}


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
