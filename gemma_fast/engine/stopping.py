"""Stopping: ends a text at an end token, a stop string or its maximum number of new tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gemma_fast.engine.request import Request


class Stopping:
    """Finds the rows that are complete. tokenizer: any object with `decode(ids) -> str`.

    Raises ValueError if a request has stop strings and tokenizer is None.
    """

    def __init__(self, requests: Sequence[Request], tokenizer: Any) -> None:
        if tokenizer is None and any(request.stop_strings for request in requests):
            raise ValueError("stop_strings needs tokenizer=…, which decodes the generated tokens")
        self.requests, self.tokenizer = requests, tokenizer

    def __call__(self, generated: Tensor) -> Tensor:
        """generated :: [b, new], all tokens so far → [b], bool: whether the newest ends its row."""
        count = generated.shape[1]
        ended = [
            token in request.eos_token_ids
            or count >= request.max_new_tokens
            or bool(request.stop_strings and self._has_stop_string(generated[row], request))
            for row, (token, request) in enumerate(
                zip(generated[:, -1].tolist(), self.requests, strict=True)
            )
        ]
        return torch.tensor(ended, device="cpu")

    def _has_stop_string(self, row: Tensor, request: Request) -> bool:
        # A character is at most 4 bytes, a token at least one: the tail contains any new match.
        tail = row[-4 * max(map(len, request.stop_strings)) :].tolist()
        text = self.tokenizer.decode(tail)
        return any(stop in text for stop in request.stop_strings)
