"""Checks the functions that a caller passes to generate(), and returns them as a list.

Their arguments and results are those of transformers' LogitsProcessor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gemma_fast.engine.bias import as_int
from gemma_fast.engine.sampler import Processor

EXAMPLES = {
    "tokenizer": "Tokenizer.from_pretrained(path)",
    "streamer": "TextStreamer(tokenizer)",
}


def processors_of(
    logits_processor: Any, prefix_allowed_tokens_fn: Any, copies: int
) -> list[Processor]:
    """Returns the functions in the order in which they change the logits.

    copies  number of successive rows that continue the same prompt
    """
    found: list[Processor] = []
    if prefix_allowed_tokens_fn is not None:
        found.append(_only_allowed(prefix_allowed_tokens_fn, copies))
    return found + functions_of("logits_processor", logits_processor)


def functions_of(name: str, given: Any) -> list[Callable[..., Any]]:
    """Returns the functions of the option `name`: None, a function or a list of functions."""
    functions = [*given] if isinstance(given, list | tuple) else [given] * (given is not None)
    for function in functions:
        if not callable(function):
            raise ValueError(f"{name}={given!r:.60} must be a function or a list of functions")
    return functions


def check_methods(name: str, given: Any, *methods: str) -> None:
    """Raises ValueError if an object that a caller passes as option `name` lacks a method."""
    for method in methods:
        if given is not None and not callable(getattr(given, method, None)):
            raise ValueError(
                f"{name}={given!r:.60} must be an object with {' and '.join(methods)}: for example,"
                f" {EXAMPLES[name]}"
            )


def _allowed_ids(given: Any, vocab_size: int) -> list[int]:
    """Returns the ids of a list, tuple, set, NumPy array or tensor."""
    listed = given.tolist() if hasattr(given, "tolist") else given
    ids = [as_int(token) for token in listed] if isinstance(listed, list | tuple | set) else [None]
    known = [token for token in ids if token is not None and 0 <= token < vocab_size]
    if len(known) != len(ids):
        raise ValueError(
            f"prefix_allowed_tokens_fn returned {given!r:.60}: it must return a list of token ids"
            f" below {vocab_size}"
        )
    return known


def _only_allowed(allowed: Callable[[int, Tensor], Sequence[int]], copies: int) -> Processor:
    """Returns a processor that excludes all tokens but allowed(prompt number, ids :: [t])."""

    def process(ids: Tensor, logits: Tensor) -> Tensor:
        excluded = torch.ones_like(logits, dtype=torch.bool)
        for row, text in enumerate(ids):
            given = allowed(row // copies, text)
            tokens = _allowed_ids(given, logits.shape[1])
            if not tokens:
                raise ValueError(
                    f"prefix_allowed_tokens_fn allows no token after the {len(text)} tokens of row"
                    f" {row}: return at least one id, for example an end token"
                )
            excluded[row, tokens] = False
        return logits.masked_fill(excluded, float("-inf"))

    return process
