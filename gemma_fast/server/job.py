"""`Job` is the texts of one HTTP request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from gemma_fast.engine.request import Request
from gemma_fast.server.engine import Engine
from gemma_fast.server.errors import ApiError, BadRequest, Full
from gemma_fast.server.ticket import Event, Ticket


class Job:
    """Takes places in the engine, and gives them back when it is closed. The caller must close it,
    also if the client goes away."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._taken = 0
        self._open: dict[int, Ticket] = {}  # texts that have not ended
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def take(self, places: int) -> None:
        """Takes places for this number of texts. Raises Full if too few are free."""
        engine = self.engine
        if places > engine.places:
            raise BadRequest(
                f"the request asks for {places} texts, but the server takes {engine.places}", "n"
            )
        if engine.failure is not None:
            raise ApiError(503, "the engine has failed: the server must be restarted")
        if engine.taken + places > engine.places:
            raise Full(engine.places)
        engine.taken += places
        self._taken += places

    def start(self, requests: Sequence[Request]) -> None:
        """Starts the texts."""
        self._open = {i: Ticket(i, x, self._events) for i, x in enumerate(requests)}
        for ticket in self._open.values():
            self.engine.add(ticket)

    async def events(self) -> AsyncIterator[Event]:
        """Yields the events of the texts until all have ended."""
        while self._open:
            event = await self._events.get()
            if event.reason is not None:
                self._open.pop(event.number, None)
            yield event

    def cancel(self, number: int) -> None:
        """Ends a text, whose last event has the reason "cancelled"."""
        if number in self._open:
            self.engine.cancel(self._open[number])

    def close(self) -> None:
        """Ends the texts that have not ended, and gives the places back."""
        for number in self._open:
            self.cancel(number)
        self._open = {}
        self.engine.taken -= self._taken
        self._taken = 0
