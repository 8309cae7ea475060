"""Checks the functions that a caller passes to generate(), and returns them as a list.

Their arguments and results are those of transformers' LogitsProcessor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gemma_fast.engine.sampling import Processor


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


def _only_allowed(allowed: Callable[[int, Tensor], Sequence[int]], copies: int) -> Processor:
    """Returns a processor that excludes all tokens but allowed(prompt number, ids :: [t])."""

    def process(ids: Tensor, logits: Tensor) -> Tensor:
        excluded = torch.ones_like(logits, dtype=torch.bool)
        for row, text in enumerate(ids):
            tokens = allowed(row // copies, text)
            if not len(tokens):
                raise ValueError(
                    f"prefix_allowed_tokens_fn allows no token after the {len(text)} tokens of row"
                    f" {row}: return at least one id, for example an end token"
                )
            excluded[row, tokens] = False
        return logits.masked_fill(excluded, float("-inf"))

    return process
