"""Turns rows into tasks: the token ids of a prompt or text, and the options of the row.

A row's options are the columns with the names of generate()'s options. Other columns are copied to
the answer, but a column whose name is almost that of an option is refused as a misspelt one.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, TypeVar

from gemma_fast.batch.job import GENERATE_COLUMNS, SCORE_COLUMNS, Job, Task
from gemma_fast.batch.rows import Numbered, Row
from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.compat import APPLIED, GENERATION_CONFIG
from gemma_fast.engine.request import LENGTHS, seed_of
from gemma_fast.text.chat_prefix import chat_prefix
from gemma_fast.text.tokenizer import Tokenizer

OPTIONS = {*GENERATION_CONFIG, "seed"}
MISSPELT = 0.8  # similarity of two names, from 0 to 1
MAX_AHEAD = 8  # rows that are prepared while others are decoded
ROW_ERRORS = (ValueError, TypeError, OverflowError, RecursionError)

T = TypeVar("T")
R = TypeVar("R")


class Preparer:
    """Prepares rows. Several threads may call it.

    prefix  token ids with which all chats with the job's system message begin
    """

    def __init__(self, model: GemmaForCausalLM, tokenizer: Tokenizer, job: Job) -> None:
        """Raises ValueError if the chat template has no place for the job's system message."""
        self.tokenizer, self.job = tokenizer, job
        self.chat_ends = sorted({*model.end_token_ids, *tokenizer.stop_token_ids})
        self.limit = job.max_length or model.config.max_position_embeddings
        self.longest = max(map(len, tokenizer.get_vocab()))  # characters of a token
        uses_system = job.system is not None and not job.score
        self.prefix = chat_prefix(tokenizer, str(job.system)) if uses_system else []

    def __call__(self, numbered: Numbered) -> Task:
        """Returns the task of a row. An error of the row is in the task."""
        number, row, file = numbered
        if isinstance(row, ValueError):
            return Task(number, file, error=row)
        known = SCORE_COLUMNS if self.job.score else (*GENERATE_COLUMNS, *OPTIONS)
        columns = {name: value for name, value in row.items() if name not in known}
        task = Task(number, file, row.get("id"), columns)
        try:
            return self._to_score(task, row) if self.job.score else self._to_continue(task, row)
        except ROW_ERRORS as error:
            return task._replace(error=error)

    def _to_continue(self, task: Task, row: Row) -> Task:
        for name in task.columns:
            if near := _similar_option(name):
                raise ValueError(
                    f"column {name!r:.60} is no option: did you mean {near}? A column with data"
                    " needs another name"
                )
        chat = "messages" in row
        if chat == ("prompt" in row):
            raise ValueError("a row must have one of the columns prompt (text), messages (a chat)")
        options = {**self.job.options, "seed": seed_of(self.job.seed, task.row)}
        if chat:
            options["eos_token_id"] = self.chat_ends
        given = {name: _whole(value) for name, value in row.items() if name in OPTIONS}
        if "max_length" in given:
            options = {name: value for name, value in options.items() if name not in LENGTHS}
        ids = self._chat_ids(row["messages"]) if chat else self._encode(_text_of(row, "prompt"))
        return task._replace(ids=ids, options={**options, **given}, chat=chat)

    def _to_score(self, task: Task, row: Row) -> Task:
        """As lm_eval's own models do, spaces at the end of a prompt belong to the completion."""
        if ("text" in row) == ("prompt" in row or "completion" in row):
            raise ValueError("a row must have the column text, or prompt and completion")
        if "text" in row:
            ids = self._encode(_text_of(row, "text"))
            before = 1
        else:
            prompt, completion = (_text_of(row, name) for name in ("prompt", "completion"))
            ids = self._encode(prompt + completion)
            before = max(len(self._encode(prompt.rstrip())), 1)
        if len(ids) > self.limit:
            raise ValueError(f"a text of {len(ids)} tokens does not fit the limit of {self.limit}")
        if len(ids) <= before:
            raise ValueError("there is no token to score: the text is empty")
        return task._replace(ids=ids, scored=len(ids) - before)

    def _encode(self, text: str) -> list[int]:
        if len(text) > self.limit * self.longest:  # encoding 20 MB takes 5 GB of memory
            raise ValueError(
                f"a text of {len(text)} characters does not fit the limit of {self.limit} tokens"
            )
        return self.tokenizer(text).input_ids

    def _chat_ids(self, messages: Any) -> list[int]:
        if self.job.system is not None and isinstance(messages, list):
            first = messages[0] if messages else None
            if not (isinstance(first, dict) and first.get("role") == "system"):
                messages = [{"role": "system", "content": self.job.system}, *messages]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids


def ahead(items: Iterable[T], function: Callable[[T], R]) -> Iterator[R]:
    """Yields function(item) of each item, in order. Threads compute up to MAX_AHEAD of them in
    advance, because a chat template is rendered in another process, which takes 70 ms."""
    workers = min(os.cpu_count() or 1, MAX_AHEAD)
    pool = ThreadPoolExecutor(workers)
    running: deque[Future[R]] = deque()
    try:
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) == MAX_AHEAD:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@lru_cache(maxsize=256)
def _similar_option(name: str) -> str | None:
    return next(iter(get_close_matches(name, APPLIED, n=1, cutoff=MISSPELT)), None)


def _whole(value: Any) -> Any:
    """Returns a float without a fraction as an int: pandas writes integers as floats in a column
    that has nulls."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _text_of(row: Row, name: str) -> str:
    if not isinstance(row.get(name), str):
        found = f"not {row[name]!r:.60}" if name in row else "but there is no such column"
        raise ValueError(f"column {name} must be text, {found}")
    return row[name]
