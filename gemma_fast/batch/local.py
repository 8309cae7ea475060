"""Runs a job in this process: rows of a file → answers in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from gemma_fast.batch.answers import Answer, AnswerFile
from gemma_fast.batch.generating import continue_prompts
from gemma_fast.batch.job import Job
from gemma_fast.batch.prompts import Preparer, ahead
from gemma_fast.batch.rows import Numbered, count_rows, read_rows, sha256
from gemma_fast.batch.scoring import score_texts
from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.text.tokenizer import Tokenizer

Load = Callable[[], tuple[GemmaForCausalLM, Tokenizer]]


def answers_of(
    model: GemmaForCausalLM, tokenizer: Tokenizer, job: Job, rows: Iterable[Numbered]
) -> Iterator[Answer]:  # fmt: skip
    """Yields the answer of each row, in the order in which their texts end. Rows are read only as
    fast as texts end.

    Raises ValueError for a setting of the job that no row can change.
    """
    preparer = Preparer(model, tokenizer, job)
    tasks = ahead(rows, preparer)
    if job.score:
        return score_texts(model, job, tasks, tokenizer.pad_token_id)
    return continue_prompts(model, tokenizer, job, tasks, preparer.prefix)


class LocalJob:
    """A job whose input and output are files of this machine. Use it in a `with` block.

    total  number of rows of the input
    file   the answers; file.done has the rows that are done

    Raises the errors of AnswerFile, and those of reading the input.
    """

    def __init__(self, job: Job, source: Path, out: Path) -> None:
        self.job, self.source = job, source
        self.total = count_rows(source)
        if out.exists() and out.samefile(source):
            raise ValueError(f"{out} is the input: pass another --out")
        self.file = AnswerFile(out, {**job.record(), "input_sha256": sha256(source)})

    def __enter__(self) -> LocalJob:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def run(self, load: Load) -> Iterator[Answer]:
        """Writes the answer of each row that is not done, then yields it. `load` returns the model
        and its tokenizer; it is not called if all rows are done."""
        if self.file.done.count == self.total:
            return
        model, tokenizer = load()
        for answer in answers_of(model, tokenizer, self.job, self._rows_to_do()):
            self.file.write(answer)
            yield answer

    def _rows_to_do(self) -> Iterator[Numbered]:
        with self.source.open("rb") as file:
            for number, row in enumerate(read_rows(file, self.source.name)):
                if number not in self.file.done:
                    yield Numbered(number, row)
