"""Benchmarks: each op and the whole model beside their rivals, as a share of this machine's roof.

    python -m benchmarks                             # everything
    python -m benchmarks rms_norm geglu --out DIR    # results.json, results.md, plots
    python -m benchmarks attention --only eager --only gemma_fast
    python -m benchmarks model --model demo          # also on a CPU

Exit status 1 if a result was wrong, or gemma_fast failed; what rivals lack is only listed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from benchmarks import report
from benchmarks.bench_model import find, model_suite
from benchmarks.harness import OURS, Result, Suite, run
from benchmarks.machine import Roof, measure_roof, stamp
from benchmarks.suites import RIVALS, SUITES, missing
from gemma_fast.config import PRESETS

MODEL_HELP = f"""What the suite `model` runs: demo (the demo weights), a size with random weights
(tiny, {", ".join(PRESETS)}), a directory, a .gguf file, a hub id. Given, it is measured on a CPU
too. [default: gemma-2b on a GPU]"""


@click.command(help=__doc__.split("\n")[0])
@click.argument("names", nargs=-1, metavar="[SUITE]...")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Write figures here.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="[default: bfloat16 on a GPU, float32 on a CPU]",
)
@click.option("--only", multiple=True, metavar="PROVIDER", help="Only these; may be repeated.")
@click.option("--model", help=MODEL_HELP)
@click.option("--commit", help="What to stamp where git does not know.")
@click.option("--list", "listing", is_flag=True, help="Suites, providers, what is installed.")
@click.pass_context
def main(
    context: click.Context, names: tuple[str, ...], out: Path | None, dtype: str | None,
    only: tuple[str, ...], model: str | None, commit: str | None, listing: bool,
) -> None:  # fmt: skip
    suites = pick(names)
    if model is not None:
        suites["model"] = pick_model(model, suites)
    refuse_unknown(only, suites.values())
    if listing:
        show_list(suites)
        return
    if out:
        make_folder(out)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    kind = getattr(torch, dtype or ("bfloat16" if cuda else "float32"))
    roof = measure_roof(device, kind) if cuda or model else None
    head = stamp(device, kind, RIVALS, commit)
    about = {name: suite.about for name, suite in suites.items()}
    results: list[Result] = []
    for suite in suites.values():
        suite_roof = roof if cuda or suite.clock == "wall" else None
        before = len(results)
        for found in measure(suite, only, device, kind, suite_roof):
            results += found
            if out:  # after each size, so that a run cut short keeps what it has
                report.write(out, head, roof, results, about)
        show(suite, results[before:], suite_roof)
    if cuda:
        head["roof_at_the_end"] = measure_roof(device, kind)._asdict()
        if out:
            report.write(out, head, roof, results, about)
    click.echo(report.heading(head, roof))
    if report.nothing_measured(results):
        click.echo(report.NOTHING)
    if out:
        write_plots(out, head["gpu"] or head["cpu"], roof, results)
    wrong = any(r.status.startswith("wrong") for r in results)
    ours = all(r.status.startswith("ok") for r in results if r.provider == OURS)
    context.exit(0 if ours and not wrong else 1)


def make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"--out {out}: {error}") from error


def refuse_unknown(only: Iterable[str], suites: Iterable[Suite]) -> None:
    known = list(dict.fromkeys(name for suite in suites for name in suite.names))
    if unknown := [name for name in only if name not in known]:
        choices = ", ".join(known)
        raise click.UsageError(f"no provider {', '.join(unknown)}: choose from {choices}")


def pick(names: Iterable[str]) -> dict[str, Suite]:
    if unknown := [name for name in names if name not in SUITES]:
        raise click.UsageError(f"no suite {', '.join(unknown)}: choose from {', '.join(SUITES)}")
    return {name: SUITES[name] for name in SUITES if name in names or not names}


def pick_model(model: str, suites: Mapping[str, Suite]) -> Suite:
    if "model" not in suites:
        raise click.UsageError("--model is for the suite model, which is not among those named")
    try:
        find(model)
    except (ValueError, OSError, ImportError) as error:
        raise click.ClickException(str(error)) from error
    return model_suite(model, (512, 8192) if torch.cuda.is_available() else (512,))


def measure(
    suite: Suite, only: Iterable[str], device: torch.device, dtype: torch.dtype, roof: Roof | None
) -> Iterator[list[Result]]:
    """The results of each size; a line for each to stderr as it comes."""
    names = [name for name in suite.names if name in only or not only]
    sizes = suite.sizes if roof else suite.tiny
    columns = TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(suite.name, total=len(sizes) * len(names))
        for size in sizes if names else ():
            results = []
            for result in run(suite, size, device, dtype, roof, names):
                results.append(result)
                done = f"{suite.name}, {size}: {result.provider}"
                progress.console.print(Text(f"{done}: {result.status}"))
                progress.update(task, advance=1, description=done)
            yield sorted(results, key=lambda result: names.index(result.provider))


def show(suite: Suite, results: list[Result], roof: Roof | None) -> None:
    title = Text(f"{suite.name}: {suite.about}")  # Text: brackets are no markup
    table = Table(*report.COLUMNS, title=title, title_justify="left")
    for row in report.rows(results, roof):
        table.add_row(*map(Text, row))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def show_list(suites: Mapping[str, Suite]) -> None:
    for suite in suites.values():
        click.echo(f"{suite.name}: {suite.about}")
        for name in suite.names:
            packages = ", ".join(missing(name))
            click.echo(f"    {name}" + (f" (not installed: {packages})" if packages else ""))


def write_plots(out: Path, where: str, roof: Roof | None, results: list[Result]) -> None:
    if roof is None or not any(r.times for r in results):
        click.echo(f"{out}: results.json, results.md. No plots: nothing was measured.")
        return
    try:
        from benchmarks.plots import plot

        plot(out, roof, results, where)
    except ImportError as error:
        click.echo(f"No plots: {error}", err=True)


if __name__ == "__main__":
    main()
