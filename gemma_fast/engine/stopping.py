"""`Stopping` ends a text at an end token, at a stop string, at its maximum number of new tokens,
after a maximum time, or when a function of the caller returns True."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gemma_fast.engine.processors import check_methods
from gemma_fast.engine.request import Request

# Function from ids :: [b, t], prompts included, and None, to ended :: [b], bool, or one bool.
Criterion = Callable[[Tensor, None], Any]


class Stopping:
    """Finds the rows of a batch whose texts are complete.

    requests   the request of each row
    tokenizer  any object with `decode(ids) -> str`; None raises ValueError if a request has stop
               strings
    criteria   functions of the caller, as transformers' stopping_criteria
    """

    def __init__(
        self, requests: Sequence[Request], tokenizer: Any, criteria: Sequence[Criterion] = ()
    ) -> None:
        for request in requests:
            if tokenizer is None and request.stop_strings:
                raise ValueError(
                    f"stop_strings={list(request.stop_strings)}, from the call or from the model's"
                    " generation_config, needs tokenizer=…, which decodes the generated tokens"
                    " (stop_strings=[]: no stop strings)"
                )
        if any(request.stop_strings for request in requests):
            check_methods("tokenizer", tokenizer, "decode")
        self.requests, self.tokenizer, self.criteria = requests, tokenizer, criteria
        self._prompts: list[list[int]] | None = None  # on the host, if there are stop strings
        self._start = time.monotonic()

    def __call__(self, ids: Tensor, generated: Tensor) -> Tensor:
        """Returns ended :: [b], bool: True if the newest token of the row ends its text.

        ids        [b, t]: the prompts
        generated  [b, new]: all new tokens until now, the newest one last
        """
        if self._prompts is None and any(request.stop_strings for request in self.requests):
            self._prompts = ids.tolist()
        prompts = self._prompts or []
        count, seconds = generated.shape[1], time.monotonic() - self._start
        ended = torch.tensor(
            [
                token in request.eos_token_ids
                or count >= request.max_new_tokens
                or seconds > request.max_time
                or bool(
                    request.stop_strings
                    and self._has_stop_string(prompts[row], generated[row], request)
                )
                for row, (token, request) in enumerate(
                    zip(generated[:, -1].tolist(), self.requests, strict=True)
                )
            ],
            device="cpu",
        )
        if self.criteria:
            text = torch.cat((ids, generated.to(ids.device)), dim=1)
            for criterion in self.criteria:
                ended = ended | _as_ended(criterion, criterion(text, None), len(text))
        return ended

    def _has_stop_string(self, prompt: list[int], new: Tensor, request: Request) -> bool:
        """Returns True if a stop string ends in the newest token; it may begin in the prompt."""
        # A character has at most 4 bytes, and a token at least 1 byte, so the stop string is within
        # these last tokens.
        size = 4 * max(map(len, request.stop_strings))
        tail = new[-size:].tolist()
        if len(tail) < size:
            tail = [*prompt[request.padding :][len(tail) - size :], *tail]
        text = self.tokenizer.decode(tail)
        if not any(stop in text for stop in request.stop_strings):
            return False
        old = len(os.path.commonprefix([text, self.tokenizer.decode(tail[:-1])]))  # noqa: RUF071
        return any(
            text.find(stop, max(old - len(stop) + 1, 0)) >= 0 for stop in request.stop_strings
        )


def _as_ended(criterion: Criterion, given: Any, rows: int) -> Tensor:
    """Returns what a criterion returned :: [rows] or [], bool."""
    try:
        ended = torch.as_tensor(given, device="cpu").bool()
    except (TypeError, ValueError, RuntimeError):
        ended = None
    if ended is None or ended.shape not in ((), (1,), (rows,)):
        found = tuple(ended.shape) if ended is not None else f"{given!r:.60}"
        raise ValueError(
            f"the stopping_criteria {criterion!r:.60} must return True, False or a tensor of bool"
            f" ({rows},), not {found}"
        )
    return ended
