"""Continues the prompts of a job's rows with `generate_many`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gemma_fast.batch.answers import Answer
from gemma_fast.batch.job import Job, Task
from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.engine.many import Generated
from gemma_fast.text.streaming import split_thoughts
from gemma_fast.text.tokenizer import Tokenizer

MAX_FAILED = 2  # batches of rows whose computation may fail one after another


def continue_prompts(
    model: GemmaForCausalLM, tokenizer: Tokenizer, job: Job, tasks: Iterable[Task],
    prefix: Sequence[int] = (),
) -> Iterator[Answer]:  # fmt: skip
    """Yields the answer of each task when its text ends. A task is taken when a row of the decoder
    is free. prefix: ids with which prompts may begin; they are computed once.

    Raises ValueError if the computation of many rows fails one after another, for example because
    the GPU has gone. These rows get no answers, so that the job can do them again.
    """
    running: dict[int, Task] = {}

    def requests() -> Iterator[dict[str, Any]]:
        for number, task in enumerate(tasks):
            running[number] = task
            yield {"input_ids": task.ids, **task.options}  # without ids, it ends with an error

    results = model.generate_many(
        requests(), tokenizer=tokenizer, batch_size=job.batch_size, max_length=job.max_length,
        batch_invariant=job.batch_invariant, prefix_ids=prefix,
    )  # fmt: skip
    failed: list[Answer] = []  # their computation failed, and no later one has succeeded
    for result in results:
        task = running.pop(result.number)
        error = task.error or result.error
        if isinstance(error, RuntimeError | MemoryError):
            failed.append(task.failure(error))
            if len(failed) > MAX_FAILED * job.batch_size:
                raise ValueError(f"{len(failed)} rows failed one after another: {error}") from error
            continue
        if error is not None:
            yield task.failure(error)
            continue
        yield from failed
        failed.clear()
        yield _answer(model, tokenizer, task, result)
    yield from failed


def _answer(
    model: GemmaForCausalLM, tokenizer: Tokenizer, task: Task, result: Generated
) -> Answer:  # fmt: skip
    stops = task.options.get("stop_strings", model.generation_config.stop_strings)
    return task.answer(
        **_texts(tokenizer, task, result.ids, stops if result.reason == "stop" else None),
        reason=result.reason, prompt_tokens=len(task.ids), new_tokens=len(result.ids),
    )  # fmt: skip


def _texts(
    tokenizer: Tokenizer, task: Task, ids: list[int], stops: str | Sequence[str] | None
) -> dict[str, str]:
    """Returns the text of new ids up to the first of `stops`, without special tokens; of a chat,
    its thoughts apart, if there are any."""
    thoughts = ""
    if task.chat:
        thoughts, text = split_thoughts(tokenizer, ids, task.ids)
    else:
        text = tokenizer.decode(ids, skip_special_tokens=True)
    found = [text.find(stop) for stop in ([stops] if isinstance(stops, str) else stops or ())]
    text = text[: min((place for place in found if place >= 0), default=None)]
    return {"text": text} | ({"thoughts": thoughts} if thoughts else {})
