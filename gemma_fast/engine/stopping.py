"""Where a text ends: an end token, a stop string, or the number of tokens that it may have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gemma_fast.engine.request import Request


class Stopping:
    """Which rows are complete. tokenizer: anything with a `decode(ids) -> str`.

    ValueError: a request has stop strings, and there is no tokenizer.
    """

    def __init__(self, requests: Sequence[Request], tokenizer: Any) -> None:
        if tokenizer is None and any(request.stop_strings for request in requests):
            raise ValueError("stop_strings needs tokenizer=…, to read what was generated")
        self.requests, self.tokenizer = requests, tokenizer

    def __call__(self, generated: Tensor) -> Tensor:
        """generated :: [b, new], all tokens so far → [b], bool: whether the newest ends its row"""
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
        # A token of text is a byte or more, so this tail holds the end of any that is new.
        tail = row[-4 * max(map(len, request.stop_strings)) :].tolist()
        text = self.tokenizer.decode(tail)
        return any(stop in text for stop in request.stop_strings)
