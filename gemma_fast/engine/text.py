"""`Text` is a request while a scheduler works on it, and its result."""

from __future__ import annotations

from typing import Literal

from gemma_fast.engine.logprobs import TokenLogprobs
from gemma_fast.engine.request import Request
from gemma_fast.engine.stopping import Reason, Stopping


class Text:
    """A request in a scheduler, and the tokens that it has got.

    request   the request
    ids       new tokens until now
    logprobs  TokenLogprobs of each new token, if the request asks for them
    reason    None until the text ends; "stop": an end token or stop string, which is in `ids`;
              "length": max_new_tokens; "time": max_time; "cancelled"; "error"
    error     the exception of an "error"

    The scheduler's own state:

    stopping  finds the end
    row       of the decoder; None while the text waits, and after its end
    read      tokens of the prompt that are in the cache
    sampled   new tokens that the device has computed or still computes
    """

    def __init__(self, request: Request, stopping: Stopping) -> None:
        self.request = request
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.reason: Reason | Literal["cancelled", "error"] | None = None
        self.error: Exception | None = None
        self.stopping = stopping
        self.row: int | None = None
        self.read, self.sampled = 0, 0
