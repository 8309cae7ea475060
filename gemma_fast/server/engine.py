"""`Engine` runs a scheduler in a thread of its own, for requests of an asyncio event loop.

event loop:  Job.start → commands …                        … events → Job.events
thread:      commands → scheduler.add, scheduler.cancel → scheduler.step → events
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.engine.scheduler import CHUNK, Scheduler, Text
from gemma_fast.server.metrics import Metrics
from gemma_fast.server.ticket import Event, Ticket
from gemma_fast.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class Engine:
    """Decodes the texts of a server.

    batch_size  texts that are decoded at the same time
    max_length  maximum number of tokens of a text, prompt included
    queue       texts that may wait for a row of the decoder
    chunk       tokens of prompts that are read between two decode steps, at most
    invariant   True: a text has the same bits whatever runs beside it, see engine/scheduler.py
    prefix      token ids with which prompts may begin; they are computed once, and copied

    places      texts that the server takes at the same time, waiting ones included; `taken` of them
                are in use. Only the event loop reads and writes `taken`
    longest     number of characters of the longest token
    failure     the exception after which the engine cannot go on, or None
    """

    def __init__(
        self, model: GemmaForCausalLM, tokenizer: Tokenizer, *, batch_size: int = 32,
        max_length: int = 8192, queue: int = 256, chunk: int = CHUNK, invariant: bool = False,
        prefix: Sequence[int] = (),
    ) -> None:  # fmt: skip
        if batch_size < 1 or max_length < 2 or queue < 0:
            raise ValueError(
                f"{batch_size=} must be at least 1, {max_length=} at least 2, {queue=} at least 0"
            )
        self.model, self.tokenizer, self.metrics = model, tokenizer, Metrics()
        self.max_length = min(max_length, model.config.max_position_embeddings)
        self.longest = max(map(len, tokenizer.get_vocab()))
        self.failure: Exception | None = None
        self._decoder = model.decoders.take(model, batch_size, self.max_length)
        self._open = functools.partial(
            Scheduler, self._decoder, tokenizer, chunk=chunk, invariant=invariant, prefix=prefix
        )
        self.scheduler = self._open()
        self.places, self.taken = self.scheduler.rows + queue, 0
        self._commands: SimpleQueue[Callable[[], object] | None] = SimpleQueue()  # None: end
        self._tickets: dict[Text, Ticket] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._add_gauges()

    def start(self) -> None:
        """Compiles the kernels of a GPU, and starts the thread, whose events go to the running
        event loop."""
        if self.model.device.type == "cuda":
            self.scheduler.warm_up()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="gemma_fast engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Cancels all texts, and ends the thread after its current step. Does not wait for it."""
        self._commands.put(None)

    def close(self) -> None:
        """Stops the thread, and waits for its end."""
        if self._thread is not None:
            self.stop()
            self._thread.join()
            self._thread = None
        self.model.decoders.give_back(self._decoder)

    def add(self, ticket: Ticket) -> None:
        """Adds a text. Its events go to the ticket."""
        self._commands.put(functools.partial(self._add, ticket))

    def cancel(self, ticket: Ticket) -> None:
        """Ends a text, and frees its row. Does nothing if the text has ended."""
        self._commands.put(functools.partial(self._cancel, ticket))

    def _add(self, ticket: Ticket) -> None:
        try:
            if self.failure is not None:
                raise self.failure
            ticket.text = self.scheduler.add(ticket.request)
        except Exception as error:
            self._deliver([(ticket, Event(ticket.number, "error", error=error))])
        else:
            self._tickets[ticket.text] = ticket

    def _cancel(self, ticket: Ticket) -> None:
        if ticket.text is not None and self.failure is None:
            self.scheduler.cancel(ticket.text)

    def _run(self) -> None:
        while True:
            works = bool(self.scheduler) and self.failure is None
            if works and self._commands.empty():
                self._try(self._step)
            elif (command := self._commands.get()) is not None:
                self._try(command)
            else:
                self._end_all("cancelled")
                self.scheduler.close()
                return

    def _try(self, command: Callable[[], object]) -> None:
        """Calls a function. If it raises, all texts end, and a new scheduler takes the next
        ones."""
        try:
            command()
        except Exception as error:
            log.exception("the scheduler failed, which ends all its texts")
            self._end_all("error", error)
            self._reopen()

    def _step(self) -> None:
        changed = self.scheduler.step()
        tickets = [self._tickets[text] for text in changed]
        self._deliver([(ticket, ticket.event()) for ticket in tickets])
        for text in changed:
            if text.reason is not None:
                del self._tickets[text]

    def _reopen(self) -> None:
        try:
            self.scheduler.close()
            self.scheduler = self._open()
        except Exception as error:
            log.exception("the engine cannot go on: restart the server")
            self.failure = error

    def _end_all(self, reason: str, error: Exception | None = None) -> None:
        tickets = [*self._tickets.values()]
        self._tickets.clear()
        self._deliver([(x, Event(x.number, reason, error=error)) for x in tickets])

    def _deliver(self, events: Sequence[tuple[Ticket, Event]]) -> None:
        now = time.monotonic()
        for ticket, event in events:
            ticket.measure(event, now, self.metrics)
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(_put, events)

    def _add_gauges(self) -> None:
        gauge = self.metrics.gauge
        gauge("texts_waiting", "Texts without a row.", lambda: self.scheduler.waiting)
        gauge("texts_running", "Texts with a row.", lambda: self.scheduler.running)
        size = self.scheduler.rows * self._decoder.cache.max_length
        gauge("cache_used_ratio", "Used part of the cache.", lambda: self.scheduler.tokens / size)


def _put(events: Sequence[tuple[Ticket, Event]]) -> None:
    for ticket, event in events:
        ticket.events.put_nowait(event)
