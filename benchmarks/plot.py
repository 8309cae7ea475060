"""Writes results.md and the plots again from a results.json, without measuring anything.

Prints the table that the README shows, if the results are of a model.

python -m benchmarks.plot benchmarks/results/cpu-amd-epyc
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from gemma_fast.benchmarks.kernels.suite import KernelResult
from gemma_fast.benchmarks.kernels.table import SUITES
from gemma_fast.benchmarks.measure.machine import Roof, Work
from gemma_fast.benchmarks.measure.model_report import model_markdown, readme_table, title_of
from gemma_fast.benchmarks.measure.plots import kernel_plots, model_plots, write_plots
from gemma_fast.benchmarks.measure.report import kernel_markdown
from gemma_fast.benchmarks.measure.timing import Times
from gemma_fast.benchmarks.model.arrival import Arrival
from gemma_fast.benchmarks.model.cases import ARRIVAL, Case
from gemma_fast.benchmarks.model.result import ModelResult

ABOUT = {name: suite.about for name, suite in SUITES.items()}


def model_result(row: Mapping[str, Any]) -> ModelResult:
    """Returns a ModelResult from its entry in results.json. Sets only what the plots need."""
    case = case_of(row)
    seconds, of_tokens = (tuple(row.get(name, ())) for name in ("samples_s", "token_samples_s"))
    return ModelResult(
        case, row["provider"], row["dtype"], row["status"], work_of(row), seconds=seconds,
        token_seconds=of_tokens,
    )  # fmt: skip


def case_of(row: Mapping[str, Any]) -> Case:
    if row["kind"] == ARRIVAL:
        return Arrival(**{name: row[name] for name in ("tokens", "batch", "prompts", "longest")})
    return Case(row["kind"], row["tokens"], row["depth"], row["batch"])


def kernel_result(row: Mapping[str, Any]) -> KernelResult:
    """Returns a KernelResult from its entry in results.json. Sets only what the plots need."""
    times = None
    if "median_us" in row:
        times = Times(*(row[name] / 1e6 for name in ("median_us", "p20_us", "p80_us")))
    return KernelResult(
        row["suite"], row["size"], row["provider"], row["status"], work_of(row),
        times=times, graph=row.get("graph"),
    )  # fmt: skip


def work_of(row: Mapping[str, Any]) -> Work:
    return Work(row.get("bytes", 0), row.get("flops", 0))  # 0 for a result that was not timed


def draw(folder: Path) -> str:
    """Reads folder/results.json, and writes results.md and the plots to the same folder. Returns
    the README's table, or an empty string for results of kernels.

    Raises ValueError if the file does not contain results of the benchmarks.
    """
    file = folder / "results.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        roof, rows = found["roof"] and Roof(**found["roof"]), found["results"]
        of_model = any("kind" in row for row in rows)
        results = [*map(model_result if of_model else kernel_result, rows)]
        text = model_markdown(found) if of_model else kernel_markdown(found, ABOUT)
        title = title_of(found["stamp"], rows[0]["model"] if of_model else None)
        shown = readme_table(found) if of_model else ""
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"{file} does not contain results of the benchmarks: {error!r}") from error
    (folder / "results.md").write_text(text, encoding="utf-8")
    write_plots(model_plots if of_model else kernel_plots, folder, roof, results, title)
    return shown


@click.command(help=__doc__.split("\n")[0])
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    try:
        click.echo(draw(folder), nl=False)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
