"""`Stopping` ends a text at an end token, at a stop string, at its maximum number of new tokens, or
after a maximum time. `ended_by` asks the functions of the caller."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gemma_fast.engine.processors import check_methods
from gemma_fast.engine.request import Request

# Function from ids :: [b, t], prompts included, and None, to ended :: [b], bool, or one bool.
Criterion = Callable[[Tensor, None], Any]
# Why a text ended: an end token or a stop string, its maximum number of tokens, its maximum time.
Reason = Literal["stop", "length", "time"]


class Stopping:
    """Finds the end of one text.

    request    its prompt and limits; its time starts now
    tokenizer  any object with `decode(ids) -> str`; None raises ValueError if the request has stop
               strings
    """

    def __init__(self, request: Request, tokenizer: Any) -> None:
        self.request, self.tokenizer, self._count = request, tokenizer, 0
        self._start = time.monotonic()
        if not request.stop_strings:
            return
        if tokenizer is None:
            raise ValueError(
                f"stop_strings={list(request.stop_strings)}, from the call or from the model's"
                " generation_config, needs tokenizer=…, which decodes the generated tokens"
                " (stop_strings=[]: no stop strings)"
            )
        check_methods("tokenizer", tokenizer, "decode")
        # A character has at most 4 bytes, and a token at least 1 byte, so a stop string is within
        # these last tokens.
        self._size = 4 * max(map(len, request.stop_strings))
        self._tail: list[int] = []
        if request.stops_in_prompt:
            self._tail = request.ids[request.padding :][-self._size :].tolist()

    def __call__(self, token: int) -> Reason | None:
        """Returns why the newest token ends the text, or None."""
        self._count += 1
        if token in self.request.eos_token_ids or self._ends_stop_string(token):
            return "stop"
        if self._count >= self.request.max_new_tokens:
            return "length"
        return "time" if self.is_late() else None

    def is_late(self) -> bool:
        return time.monotonic() - self._start > self.request.max_time

    def _ends_stop_string(self, token: int) -> bool:
        """Returns True if a stop string ends in this token; it may begin in an earlier one."""
        stops = self.request.stop_strings
        if not stops:
            return False
        self._tail = [*self._tail, token][-self._size :]
        text = self.tokenizer.decode(self._tail)
        if not any(stop in text for stop in stops):
            return False
        before = self.tokenizer.decode(self._tail[:-1])
        old = len(os.path.commonprefix([text, before]))  # noqa: RUF071
        return any(text.find(stop, max(old - len(stop) + 1, 0)) >= 0 for stop in stops)


def ended_by(criteria: Sequence[Criterion], text: Tensor) -> Tensor:
    """Returns ended :: [b], bool, on the host: whether a function of the caller ends the row of
    text :: [b, t], the prompts and the new tokens."""
    ended = torch.zeros(len(text), dtype=torch.bool, device="cpu")
    for criterion in criteria:
        ended = ended | _as_ended(criterion, criterion(text, None), len(text))
    return ended


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
