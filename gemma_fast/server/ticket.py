"""`Ticket` is a text of a request on its way between the event loop and the engine's thread, and
`Event` is what the thread reports of it."""

from __future__ import annotations

import asyncio
import time
from typing import NamedTuple

from gemma_fast.engine.logprobs import TokenLogprobs
from gemma_fast.engine.request import Request
from gemma_fast.engine.scheduler import Text
from gemma_fast.server.metrics import Metrics


class Event(NamedTuple):
    """New tokens of a text, or its end.

    number    of the text in its request, from 0
    reason    None, or why the text ended, see `engine.scheduler.Text`
    ids       new tokens since the last event
    logprobs  log-probabilities of each of them, if the request asks for them
    error     the exception of an "error"
    """

    number: int
    reason: str | None
    ids: list[int] = []  # noqa: RUF012 (never changed)
    logprobs: list[TokenLogprobs] = []  # noqa: RUF012
    error: Exception | None = None


class Ticket:
    """A text of a request.

    number  of the text in its request, from 0
    events  receives the events of all texts of the request
    text    None until the scheduler has it
    """

    def __init__(self, number: int, request: Request, events: asyncio.Queue[Event]) -> None:
        self.number, self.request, self.events = number, request, events
        self.text: Text | None = None
        self._reported = 0  # tokens in events
        self._time = time.monotonic()  # of the newest token, or of the start

    def event(self) -> Event:
        """Returns what is new of the text."""
        text = self.text
        assert text is not None
        start, self._reported = self._reported, len(text.ids)
        return Event(self.number, text.reason, text.ids[start:], text.logprobs[start:], text.error)

    def measure(self, event: Event, now: float, metrics: Metrics) -> None:
        """Counts the tokens of an event, and the time since the last one."""
        if event.ids:
            first = self._reported == len(event.ids)
            histogram = metrics.first_token if first else metrics.next_token
            histogram.observe((now - self._time) / (1 if first else len(event.ids)))
            metrics.new_tokens.inc(len(event.ids))
            if first:
                metrics.prompt_tokens.inc(len(self.request.ids))
            self._time = now
        if event.reason is not None:
            metrics.texts.labels(event.reason).inc()
