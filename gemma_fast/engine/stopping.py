"""`Stopping` ends a text at an end token, a stop string or its maximum number of new tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gemma_fast.engine.request import Request


class Stopping:
    """Finds the rows of a batch whose texts are complete.

    requests   the request of each row
    tokenizer  any object with `decode(ids) -> str`; None raises ValueError if a request has stop
               strings
    """

    def __init__(self, requests: Sequence[Request], tokenizer: Any) -> None:
        if tokenizer is None and any(request.stop_strings for request in requests):
            raise ValueError("stop_strings needs tokenizer=…, which decodes the generated tokens")
        self.requests, self.tokenizer = requests, tokenizer

    def __call__(self, generated: Tensor) -> Tensor:
        """Returns ended :: [b], bool: True if the newest token of the row ends its text.

        generated :: [b, new]: all new tokens until now, the newest one last.
        """
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
        # A character has at most 4 bytes, and a token at least 1 byte, so a stop string that ends
        # in the newest token is within these last tokens.
        tail = row[-4 * max(map(len, request.stop_strings)) :].tolist()
        text = self.tokenizer.decode(tail)
        return any(stop in text for stop in request.stop_strings)
