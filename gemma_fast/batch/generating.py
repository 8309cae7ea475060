"""Continues the prompts of a job's rows with `generate_many`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gemma_fast.batch.answers import Answer
from gemma_fast.batch.job import Job, Task
from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.engine.many import Generated
from gemma_fast.text.answer import AnswerText
from gemma_fast.text.tokenizer import Tokenizer

MAX_FAILED = 2  # batches of rows whose computation may fail one after another


def continue_prompts(
    model: GemmaForCausalLM, tokenizer: Tokenizer, job: Job, tasks: Iterable[Task],
    prefix: Sequence[int] = (),
) -> Iterator[Answer]:  # fmt: skip
    """Yields the answer of each task when its text ends. A task is taken when a row of the decoder
    is free. prefix: ids with which prompts may begin; they are computed once.

    Raises ValueError if an option of the job is out of range. Raises ValueError if the computation
    of many rows fails one after another, for example because the GPU has gone. These rows get no
    answers, so that the job can do them again.
    """
    model.request([0], **{"max_new_tokens": 1, **job.options})
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
        if task.error is None and isinstance(error, RuntimeError | MemoryError):
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
    """Returns the answer with the text of the new ids, up to a stop string. The thoughts of a chat
    are apart, if there are any."""
    stops = task.options.get("stop_strings", model.generation_config.stop_strings) or ()
    text = AnswerText(
        tokenizer, task.ids, stop_strings=[stops] if isinstance(stops, str) else stops,
        chat=task.chat,
    )  # fmt: skip
    pieces = text.add(result.ids) + text.end()
    texts = {
        kind: "".join(piece.text for piece in pieces if piece.kind == kind)
        for kind in ("text", "thought")
    }
    return task.answer(
        text=texts["text"], **({"thoughts": texts["thought"]} if texts["thought"] else {}),
        reason=result.reason, prompt_tokens=len(task.ids), new_tokens=len(result.ids),
    )  # fmt: skip
