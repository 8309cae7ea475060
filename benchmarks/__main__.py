"""Benchmarks each op and the whole model. Compares them with rivals and this machine's peak rates.

    python -m benchmarks                             # everything: each kernel, then the model
    python -m benchmarks rms_norm geglu --out DIR    # results.json, results.md, plots
    python -m benchmarks attention --only eager --only gemma_fast
    python -m benchmarks model --model demo -d 0,512 # same as gemma-fast bench; also on a CPU

Exits with status 1 if a result is wrong or gemma_fast fails. A rival that fails is only listed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from gemma_fast.benchmarks import options as shared
from gemma_fast.benchmarks.kernels.rivals import RIVALS, missing
from gemma_fast.benchmarks.kernels.suite import KernelResult, Suite, run
from gemma_fast.benchmarks.kernels.table import SUITES
from gemma_fast.benchmarks.measure import machine, report
from gemma_fast.benchmarks.measure.machine import Roof
from gemma_fast.benchmarks.measure.model_report import title_of
from gemma_fast.benchmarks.measure.outcome import serious, with_took
from gemma_fast.benchmarks.measure.plots import kernel_plots, write_plots
from gemma_fast.benchmarks.model.command import run_model
from gemma_fast.benchmarks.model.providers import ARRIVAL_PROVIDERS, PROVIDERS, providers_of

MODEL = "model"
MODEL_OPTIONS = (
    "prompts", "new", "depths", "batches", "arrival", "repeats", "model", "quantize", "output"
)  # fmt: skip


@click.command(help=__doc__.split("\n")[0])
@click.argument("names", nargs=-1, metavar="[SUITE]...")
@shared.options
@shared.size_option
@click.option("--list", "listing", is_flag=True, help="List suites, providers, missing packages.")
@click.pass_context
def main(
    context: click.Context, names: tuple[str, ...], sizes: tuple[str, ...], listing: bool,
    **options: Any,
) -> None:  # fmt: skip
    suites, only, out = pick(names), options["only"], options["out"]
    with_model = not names or MODEL in names
    known = [name for suite in suites.values() for name in suite.names]
    of_model = providers_of(any(options["arrival"]))
    known += of_model if with_model else []
    shared.refuse_unknown("provider", only, dict.fromkeys(known))
    with_model &= not only or any(name in of_model for name in only)
    if not with_model:
        why = f"is for the suite {MODEL}, which is not selected: add it, or one of its providers"
        shared.refuse_options(context, MODEL_OPTIONS, why)
    if not suites:
        shared.refuse_options(context, ["sizes"], f"is not for the suite {MODEL}: use -p, -n, -d")
    if suites and len(options["dtypes"]) > 1:
        raise click.UsageError(f"several --dtype are for the suite {MODEL} alone")
    if suites and options["output"] == "json":
        raise click.UsageError(f"-o json is for the suite {MODEL} alone: use --out to write JSON")
    if listing:
        show_list(suites, with_model)
        return
    shared.make_folder(out)
    well, roof = run_kernels(suites, sizes, options) if suites else (True, None)
    if with_model:
        folder = out / MODEL if out and suites else out
        shared.make_folder(folder)
        well &= run_model(**options | {"out": folder}, roof=roof)
    context.exit(0 if well else 1)


def pick(names: Iterable[str]) -> dict[str, Suite]:
    """Returns the kernel suites among the names, in the order of the names; or all kernel suites if
    no names are given."""
    shared.refuse_unknown("suite", names, (*SUITES, MODEL))
    return {name: SUITES[name] for name in names or SUITES if name != MODEL}


def run_kernels(
    suites: Mapping[str, Suite], sizes: Sequence[str], options: Mapping[str, Any]
) -> tuple[bool, Roof | None]:
    """Runs the suites, prints the results and writes them to the folder in options["out"].

    Returns whether the run passed (see outcome.serious), and the roof (None without a GPU).
    """
    only, out = options["only"], options["out"]
    device, kind = machine.device_and_dtype(next(iter(options["dtypes"]), None))
    known = [x for suite in suites.values() for x in suite.sizes_on(device)]
    shared.refuse_unused_sizes(known, sizes)
    roof = machine.measure_roof(device, kind) if device.type == "cuda" else None
    head = machine.stamp(device, [kind], RIVALS, options["commit"])
    about = {name: suite.about for name, suite in suites.items()}
    results: list[KernelResult] = []
    for suite in suites.values():
        before = len(results)
        for of_a_size in results_by_size(suite, only, sizes, device, kind, roof):
            results += of_a_size
            if out:  # written after each size, so that an interrupted run keeps its results
                report.kernel_report(head, roof, results, about).write(out)
        if rows := report.kernel_rows(roof, results)[before:]:
            show(suite, rows)
    if roof:
        machine.measure_again(head, device, kind)
        if out:
            report.kernel_report(head, roof, results, about).write(out)
    click.echo(report.heading(head, roof))
    if roof is None:
        click.echo(report.NOTHING)
    if out:
        write_plots(kernel_plots, out, roof, results, title_of(head, None))
    return not serious(results), roof


def results_by_size(
    suite: Suite, only: Iterable[str], sizes: Sequence[str], device: torch.device,
    dtype: torch.dtype, roof: Roof | None,
) -> Iterator[list[KernelResult]]:  # fmt: skip
    """Yields one list of results per size. Prints each result's status to stderr immediately."""
    names = [name for name in suite.names if name in only or not only]
    sizes = shared.pick_sizes(suite.sizes_on(device), sizes)
    if not names or not sizes:
        return
    columns = TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(suite.name, total=len(sizes) * len(names))
        for size in sizes:
            results = []
            for result in with_took(run(suite, size, device, dtype, roof, names)):
                results.append(result)
                done = f"{suite.name}, {size}: {result.provider}"
                progress.console.print(Text(f"{done}: {result.status}, {result.took:.1f} s"))
                progress.update(task, advance=1, description=done)
            yield results


def show(suite: Suite, rows: Iterable[Mapping[str, Any]]) -> None:
    title = Text(f"{suite.name}: {suite.about}")  # rich does not parse markup in a Text
    table = Table(*report.KERNEL_COLUMNS, title=title, title_justify="left")
    for cells in map(report.kernel_cells, rows):
        table.add_row(*(Text(cells.get(name, "")) for name in report.KERNEL_COLUMNS))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def show_list(suites: Mapping[str, Suite], with_model: bool) -> None:
    listed = {f"{name}: {suite.about}": suite.names for name, suite in suites.items()}
    if with_model:
        listed[f"{MODEL}: A whole model: prefill and decode"] = [*PROVIDERS]
        listed[f"{MODEL} --arrival: Many prompts, continuous batching"] = [*ARRIVAL_PROVIDERS]
    for about, names in listed.items():
        click.echo(about)
        for name in names:
            packages = ", ".join(missing(name))
            click.echo(f"    {name}" + (f" (not installed: {packages})" if packages else ""))


if __name__ == "__main__":
    main()
