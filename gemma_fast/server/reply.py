"""`Reply` is the answer to one request, as one object or as a stream of events (SSE)."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

from gemma_fast.engine.request import Request
from gemma_fast.server.answers import Answers, usage_of
from gemma_fast.server.choice import Choice, Delta
from gemma_fast.server.errors import INTERNAL, ApiError
from gemma_fast.server.job import Job
from gemma_fast.server.ticket import Event
from gemma_fast.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class Reply:
    """Starts the texts of a request.

    texts        number of texts for each prompt
    chat, calls  see `text.answer.AnswerText`
    """

    def __init__(
        self, job: Job, requests: Sequence[Request], answers: Answers, tokenizer: Tokenizer, *,
        texts: int, chat: bool = False, calls: bool = False,
    ) -> None:  # fmt: skip
        self._job, self._answers = job, answers
        self._choices = [
            Choice(i, request, tokenizer, chat=chat, calls=calls)
            for i, request in enumerate(requests)
        ]
        self._prompt_tokens = sum(len(request.ids) for request in requests[::texts])
        job.start(requests)

    async def whole(self) -> dict[str, Any]:
        """Waits for all texts. Returns one object. Raises ApiError."""
        found = [Delta(choice.number) for choice in self._choices]
        async for delta in self._deltas():
            found[delta.number] += delta
        # Log-probabilities of a long text take seconds.
        return await asyncio.to_thread(self._answers.whole, found, self._usage())

    async def stream(self, include_usage: bool) -> AsyncIterator[str]:
        """Yields events for the parts of the texts, and with include_usage one for the usage. After
        an error, the last event has its message."""
        more = {"usage": None} if include_usage else {}
        try:
            async for delta in self._deltas():
                if delta:
                    yield _event(self._answers.chunk(delta, **more))
            if include_usage:
                yield _event(self._answers.chunk(None, usage=self._usage()))
        except ApiError as error:
            yield _event(error.content)
        yield "data: [DONE]\n\n"

    async def _deltas(self) -> AsyncIterator[Delta]:
        async for event in self._job.events():
            choice = self._choices[event.number]
            if not choice.finished:
                _check(event)
                yield choice.take(event)
                if choice.finished and event.reason is None:  # only the text has a stop string
                    self._job.cancel(event.number)

    def _usage(self) -> dict[str, int]:
        return usage_of(self._prompt_tokens, sum(choice.tokens for choice in self._choices))


def _check(event: Event) -> None:
    """Raises ApiError if a text has no end of its own."""
    if event.reason == "error":
        log.error("a text ended with an error", exc_info=event.error)
        raise ApiError(500, INTERNAL)
    if event.reason == "cancelled":
        raise ApiError(503, "the server shuts down")


def _event(content: dict[str, Any]) -> str:
    # Only ASCII, because some clients also end a line at U+0085 or U+2028.
    return f"data: {json.dumps(content)}\n\n"
