"""`Scheduler` decodes many texts at once: continuous batching over one decoder.

    add → waiting → reading its prompt → running → ended
                    └──── it has a row of the decoder ───┘

    step:  waiting texts take free rows, in the order of arrival
           → at most `chunk` tokens of prompts are read
           → one decode step of all running texts
           → tokens, ends; an ended text frees its row at once

Texts join and leave between decode steps, so a decode step is late by the time of `chunk` prompt
tokens at most. A prompt is read alone, in parts of `chunk` tokens counted from its start. Its
numbers do not depend on the texts beside it.

A decode step runs the first rows of the decoder, as many as `bucket_of` gives for the running
texts; texts in higher rows move to free lower ones. A text's numbers depend on the texts beside it
by this number alone: each kernel computes a row by itself, but kernels for one row, for few rows
and for many rows add in different orders. With `invariant`, each step runs all rows, and all logits
are processed, so a text has the same bits whatever runs beside it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemma_fast.engine.decoder import Decoder, bucket_of
from gemma_fast.engine.generate import not_finite
from gemma_fast.engine.host_copy import to_device
from gemma_fast.engine.logprobs import TokenLogprobs, start_logprobs
from gemma_fast.engine.request import Request
from gemma_fast.engine.sampling import Sampling
from gemma_fast.engine.stopping import Stopping
from gemma_fast.engine.text import Text
from gemma_fast.model.cache import KVCache

CHUNK = 512  # prompt tokens that are read between two decode steps
# Settings with which `warm_up` runs: each has kernels of its own, or a CUDA graph.
WARM_UP = (
    Sampling(), Sampling(do_sample=True), Sampling(do_sample=True, top_k=1),
    Sampling(repetition_penalty=2.0),
)  # fmt: skip


class QueueFull(Exception):
    """The queue of waiting texts is at its limit."""


class _Step(NamedTuple):
    """Tokens that the device computes: those of some texts, in rows of the decoder."""

    texts: Sequence[tuple[int, Text]]  # row, text
    token: Callable[[], Tensor]  # waits, then returns the token of each row of the decoder
    logprobs: Callable[[], list[TokenLogprobs | None]]  # waits; of each of `texts`


class Scheduler:
    """Decodes texts that join and leave between decode steps. One thread calls it.

    decoder     its rows are the places of texts
    tokenizer   decodes new tokens to find stop strings; needed only if a request has them
    max_length  maximum number of tokens of a text, prompt included; None: as the decoder's cache
    chunk       tokens of prompts that are read between two decode steps, at most
    queue       maximum number of waiting texts; None: no limit
    invariant   True: the tokens of a text do not depend on the texts beside it, not even in the
                last bit of a logit; each step runs all rows
    prefix      token ids with which prompts may begin, for example those of a system prompt. They
                are computed once, and copied
    """

    def __init__(
        self, decoder: Decoder, tokenizer: Any = None, *, max_length: int | None = None,
        chunk: int = CHUNK, queue: int | None = None, invariant: bool = False,
        prefix: Sequence[int] = (),
    ) -> None:  # fmt: skip
        if chunk < 1:
            raise ValueError(f"{chunk=} must be at least 1")
        self.decoder, self.tokenizer = decoder, tokenizer
        room = decoder.cache.max_length
        self.max_length = room if max_length is None else min(max_length, room)
        self.chunk, self.queue, self.invariant = chunk, queue, invariant
        self._rows: list[Text | None] = [None] * decoder.cache.batch
        self._waiting: deque[Text] = deque()
        self._reading: deque[Text] = deque()
        self._steps: deque[_Step] = deque()  # their tokens are not on the host yet
        self._changed: dict[Text, None] = {}  # texts that got a token or ended in this step
        decoder.open(invariant)
        self._prefix = [*prefix]
        self._prefix_cache = self._compute_prefix() if self._prefix else None

    @property
    def rows(self) -> int:
        """Number of texts that can run at the same time."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Number of texts that have no row yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of texts that have a row."""
        return sum(text is not None for text in self._rows)

    @property
    def tokens(self) -> int:
        """Number of tokens in the cache, of all texts."""
        return sum(text.read + len(text.ids) for text in self._rows if text)

    def __bool__(self) -> bool:
        """True if there is a text that has not ended."""
        return bool(self._waiting or self.running or self._changed)

    def add(self, request: Request) -> Text:
        """Appends a request to the queue. Raises QueueFull, and ValueError if its tokens do not fit
        the cache, or if it has stop strings and there is no tokenizer."""
        prompt = len(request.ids)
        if prompt + request.max_new_tokens > self.max_length:
            raise ValueError(
                f"a prompt of {prompt} tokens and max_new_tokens={request.max_new_tokens} do not"
                f" fit max_length={self.max_length}"
            )
        if self.queue is not None and self.waiting >= self.queue:
            raise QueueFull(f"{self.waiting} texts are waiting, which is the limit")
        text = Text(request, Stopping(request, self.tokenizer))
        self._waiting.append(text)
        return text

    def cancel(self, text: Text) -> None:
        """Ends a text, and frees its row. Does nothing if it has ended."""
        self._end(text, "cancelled")

    @torch.no_grad()
    def step(self) -> list[Text]:
        """Reads parts of prompts, and decodes one token of each running text. Returns the texts
        that got tokens or ended. A text whose computation fails ends with "error"; the others go
        on."""
        for text in [x for x in (*self._waiting, *self._reading) if x.stopping.is_late()]:
            self._end(text, "time")
        self._admit()
        self._read_prompts()
        decoding = self._decode()
        while len(self._steps) > (decoding and self.decoder.ahead):
            self._collect(self._steps.popleft())
        changed, self._changed = self._changed, {}
        return [*changed]

    def warm_up(self) -> None:
        """Compiles the kernels and captures the CUDA graphs of later steps, before the first text
        is added: those of each number of rows, for greedy, sampled, filtered and penalized
        tokens."""
        assert not self, "texts are waiting or running"
        decoder, size = self.decoder, min(self.chunk, self.decoder.cache.max_length)
        lengths = [*(2**power for power in range(size.bit_length())), size]
        # Kernels are compiled for pointers that are multiples of 16 bytes, and for others. The
        # pointers to a row are all of one kind, all of the other, or both.
        for row in range(min(3, self.rows)):
            cases = [(length, WARM_UP[0]) for length in lengths] + [(1, x) for x in WARM_UP[1:]]
            for length, sampling in cases:
                ids = decoder.token.new_zeros(1, length)
                decoder.read_last(row, ids, ids, sampling)
                decoder.clear_row(row)
        for sampling in WARM_UP:
            decoder.sampler.set([sampling])
            for rows in sorted({self._step_rows(row) for row in range(self.rows)}):
                for _ in range(2):  # the second step is captured
                    decoder.step(rows)
        decoder.open(self.invariant)

    def close(self) -> None:
        """Cancels all texts, and waits for the device."""
        for text in [*self._waiting, *filter(None, self._rows)]:
            self._end(text, "cancelled")
        self._steps.clear()
        self.decoder.wait()

    def _compute_prefix(self) -> KVCache:
        """Returns a cache of one row with the keys and values of the prefix."""
        room = self.decoder.cache.max_length
        if len(self._prefix) >= room:
            raise ValueError(f"prefix: {len(self._prefix)} tokens do not fit max_length={room}")
        self._read_ids(0, self._prefix)
        cache = self.decoder.model.new_cache(1, room)
        cache.copy_from(self.decoder.cache.rows(0))
        self.decoder.clear_row(0)
        return cache

    def _read_ids(self, row: int, ids: Sequence[int]) -> None:
        tokens = torch.tensor([ids], device=self.decoder.token.device)
        for part in tokens.split(self.chunk, dim=1):
            self.decoder.read_prompt(row, part)

    def _admit(self) -> None:
        """Gives free rows to waiting texts, the lowest row to the oldest text."""
        for row, owner in enumerate(self._rows):
            if not self._waiting:
                return
            if owner is None:
                text = self._waiting.popleft()
                self._rows[row], text.row = text, row
                self._reading.append(text)
                prefix, ids = self._prefix, text.request.ids
                if self._prefix_cache and prefix == ids[: len(prefix)].tolist() != ids.tolist():
                    self.decoder.cache.rows(row).copy_from(self._prefix_cache)
                    text.read = len(prefix)

    def _read_prompts(self) -> None:
        """Reads the next parts of prompts, `chunk` tokens in all at most. The oldest text's come
        first. A prompt's last part gives its first new token."""
        left = self.chunk
        while self._reading:
            text = self._reading[0]
            prompt, row = text.request.ids, text.row
            assert row is not None
            part = prompt[text.read : text.read + self.chunk].unsqueeze(0)
            if part.shape[1] > left:
                return
            left -= part.shape[1]
            try:
                self._read_part(text, row, part)
            except (RuntimeError, MemoryError) as error:
                self._end(text, "error", error)
                continue
            text.read += part.shape[1]
            if text.read == len(prompt):
                self._reading.popleft()

    def _read_part(self, text: Text, row: int, part: Tensor) -> None:
        request, part = text.request, to_device(part, self.decoder.token.device)
        if text.read + part.shape[1] < len(request.ids):
            self.decoder.read_prompt(row, part)
            return
        prompt, keeps = request.ids.unsqueeze(0), request.logprobs is not None
        self.decoder.read_last(row, part, prompt, request.sampling, keeps)
        self._launched([(row, text)])

    def _decode(self) -> bool:
        """Starts a decode step, if a text needs one."""
        self._compact()
        running = [
            (row, text)
            for row, text in enumerate(self._rows)
            if text and 0 < text.sampled < text.request.max_new_tokens
        ]
        if not running:
            return False
        try:
            self.decoder.step(self._step_rows(running[-1][0]))
            self._launched(running)
        except (RuntimeError, MemoryError) as error:
            for _, text in running:
                self._end(text, "error", error)
            return False
        return True

    def _launched(self, texts: Sequence[tuple[int, Text]]) -> None:
        """Starts to copy the newest token of these texts to the host."""
        for _, text in texts:
            text.sampled += 1
        wanted = [(row, text.request.logprobs) for row, text in texts]
        logprobs = start_logprobs(self.decoder.sampler, wanted)
        self._steps.append(_Step(texts, self.decoder.read(), logprobs))

    def _step_rows(self, last: int) -> int:
        """Returns the number of rows of a step that decodes rows up to `last`."""
        return self.rows if self.invariant else bucket_of(last + 1)

    def _compact(self) -> None:
        """Moves texts to lower rows, if a step of fewer rows can then decode all of them."""
        if self.invariant:
            return
        size = bucket_of(max(self.running, 1))
        for source in range(size, len(self._rows)):
            text = self._rows[source]
            if text is not None:
                target = self._rows.index(None)
                self.decoder.move_row(source, target)
                self._rows[target], self._rows[source], text.row = text, None, target

    def _collect(self, step: _Step) -> None:
        """Appends the tokens of a step to their texts."""
        token = step.token().tolist()
        for (row, text), logprobs in zip(step.texts, step.logprobs(), strict=True):
            if text.reason is not None:
                continue
            if token[row] < 0:
                tokens = len(text.request.ids) + len(text.ids)
                changed = text.request.sampling.changes_logits
                self._end(text, "error", not_finite(tokens, changed))
                continue
            text.ids.append(token[row])
            if logprobs is not None:
                text.logprobs.append(logprobs)
            self._changed[text] = None
            reason = text.stopping(token[row])
            if reason is not None:
                self._end(text, reason)

    def _end(self, text: Text, reason: Any, error: Exception | None = None) -> None:
        """Ends a text, and frees its row."""
        if text.reason is not None:
            return
        text.reason, text.error = reason, error
        self._changed[text] = None
        for queue in (self._waiting, self._reading):
            if text in queue:
                queue.remove(text)
        if text.row is not None:
            self.decoder.clear_row(text.row)
            self._rows[text.row] = None
            text.row = None
