"""`gemma-fast batch` continues or scores the rows of a file."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_fast.cli import loading
from gemma_fast.cli.options import model_options, sampling_options
from gemma_fast.cli.stream import given_options

if TYPE_CHECKING:
    from gemma_fast.batch.answers import Answer
    from gemma_fast.batch.job import Job
    from gemma_fast.batch.local import LocalJob

INTERRUPTED = 130  # exit status after Ctrl-C, as in a shell


@click.command(short_help="Continue each prompt of a file, or score its texts.")
@click.argument("source", metavar="PROMPTS")
@click.option(
    "--out", required=True, help="File of the answers, JSON Lines; with --ray, a folder or URI."
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=32, show_default=True,
    help="Number of texts that are computed at the same time.",
)  # fmt: skip
@click.option(
    "--max-length",
    type=click.IntRange(2),
    help="Maximum tokens of a prompt with its answer; sets the size of the cache. [default: the"
    " model's context, up to 8192]",
)
@click.option(
    "--batch-invariant",
    is_flag=True,
    help="A text has the same bits whatever runs beside it. Slower while few texts run.",
)
@click.option("--system", help="System message in front of each chat that has none.")
@click.option("--score", is_flag=True, help="Compute the log-probability of given texts.")
@click.option("--ray", "address", help='Run on Ray: the address of a cluster, or "local".')
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="With --ray: number of models. [default: one for each GPU; without GPUs, one]",
)
@model_options
@sampling_options
def batch(
    source: str, out: str, batch_size: int, max_length: int | None, batch_invariant: bool,
    system: str | None, score: bool, address: str | None, workers: int | None,
    model: str | None, device: str | None, dtype: str, quantize: str | None, **sampling: Any,
) -> None:  # fmt: skip
    """Continue each prompt of PROMPTS, a file .jsonl or .parquet with a column prompt (text) or
    messages (a chat). A row may also have an id, and options of its own, such as max_new_tokens.
    With --score, compute the log-probability of its column text, or of completion after prompt.

    Each answer is one line of the output. A row that cannot be answered gets a line with its error.
    After an interruption, the same command goes on. See docs/batch.md.
    """
    from gemma_fast.batch.job import Job
    from gemma_fast.demo import demo_checkpoint

    if workers is not None and address is None:
        raise click.BadParameter("it needs --ray", param_hint="--workers")
    seed = sampling.pop("seed")
    path = str(model or demo_checkpoint())
    job = Job(
        model=os.path.abspath(path) if os.path.exists(path) else path,
        device=device, dtype=dtype, quantize=quantize, score=score,
        options={} if score else given_options(sampling), system=system, seed=seed or 0,
        batch_size=batch_size, max_length=max_length, batch_invariant=batch_invariant,
    )  # fmt: skip
    if address is None:
        _run_here(job, Path(source), Path(out))
        return
    from gemma_fast.batch.ray_job import run_on_ray

    done = run_on_ray(job, source, out, address=address, workers=workers)
    click.echo(_summary(done.rows, done.errors, out), err=True)


def _run_here(job: Job, source: Path, out: Path) -> None:
    from gemma_fast.batch.local import LocalJob

    def load() -> Any:
        return loading.load(job.model, job.device, job.dtype, job.quantize)

    with LocalJob(job, source, out) as local:
        try:
            for _ in _shown(local, local.run(load)):
                pass
        except KeyboardInterrupt:
            done = local.file.done.count
            click.echo(
                f"Stopped: {done} of {local.total} rows are done. The same command goes on.",
                err=True,
            )
            raise click.exceptions.Exit(INTERRUPTED) from None
        click.echo(_summary(local.file.done.count, local.file.errors, out), err=True)


def _summary(rows: int, errors: int, out: object) -> str:
    return f"{rows} rows are done{f', {errors} with an error' if errors else ''}: {out}"


def _shown(local: LocalJob, answers: Iterator[Answer]) -> Iterator[Answer]:
    """Yields the answers, and shows rows, errors, tokens per second and time left on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[errors]} errors"),
        TextColumn("{task.fields[speed]:.0f} tokens/s"), TextColumn("time left"),
        TimeRemainingColumn(compact=True),
    )  # fmt: skip
    tokens, start = 0, time.perf_counter()
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=600) as progress:
        bar = progress.add_task(
            "", total=local.total, completed=local.file.done.count, errors=local.file.errors,
            speed=0.0,
        )  # fmt: skip
        for answer in answers:
            tokens += answer.get("new_tokens", 0) + answer.get("tokens", 0)
            speed = tokens / (time.perf_counter() - start)
            progress.update(bar, advance=1, errors=local.file.errors, speed=speed)
            yield answer
