"""The command of the whole model's benchmark, which `gemma-fast bench` and `python -m benchmarks`
share. Imports nothing large before it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_fast.config import PRESETS

if TYPE_CHECKING:
    import torch

    from gemma_fast.benchmarks.measure.machine import Roof

Command = Callable[..., Any]
MODEL_HELP = f"""demo (the demo weights), a size with random weights (tiny, {", ".join(PRESETS)}),
a directory, a .gguf file, a hub id. [default: gemma-2b on a GPU; on a CPU tiny, which is checked
and not measured]"""


class Counts(click.ParamType):
    """Whole numbers, parted by commas."""

    name = "N,N…"

    def __init__(self, least: int) -> None:
        self.least = least

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        try:
            counts = tuple(int(x) for x in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not whole numbers parted by commas", param, ctx)
        if min(counts) < self.least:
            self.fail(f"{min(counts)} is less than {self.least}", param, ctx)
        return counts


def counts(*names: str, default: int, least: int, help: str) -> Callable[[Command], Command]:
    """An option of some numbers, by commas or repeated; each once, in the order given."""

    def flatten(context: Any, option: Any, groups: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
        given = dict.fromkeys(count for group in groups for count in group)
        return tuple(given) or (default,)

    return click.option(
        *names, type=Counts(least), multiple=True, callback=flatten,
        help=f"{help} [default: {default}]",
    )  # fmt: skip


OPTIONS = (
    counts("-p", "prompts", default=512, least=0, help="Tokens of prompts to read; 0: none."),
    counts("-n", "new", default=128, least=0, help="Tokens to write; 0: none."),
    counts("-d", "depths", default=0, least=0, help="Tokens in the cache before."),
    counts("-b", "batches", default=1, least=1, help="Sequences at once."),
    click.option(
        "-r", "repeats", type=click.IntRange(1), default=5, show_default=True, metavar="N",
        help="How often each test is timed.",
    ),
    click.option("--model", help=MODEL_HELP),
    click.option(
        "--dtype",
        type=click.Choice(["bfloat16", "float16", "float32"]),
        help="[default: bfloat16 on a GPU, float32 on a CPU]",
    ),
    click.option("--only", multiple=True, metavar="PROVIDER", help="Only these; repeatable."),
    click.option(
        "-o", "output", type=click.Choice(["md", "json"]), default="md", show_default=True,
        help="What the model's results are printed as.",
    ),
    click.option(
        "--out", type=click.Path(path_type=Path, file_okay=False),
        help="Write results.json, results.md and plots here.",
    ),
    click.option("--commit", help="What to stamp where git does not know."),
)  # fmt: skip


def options(command: Command) -> Command:
    for option in reversed(OPTIONS):
        command = option(command)
    return command


@click.command(short_help="Speed of a whole model, beside its rivals.")
@options
@click.pass_context
def bench(context: click.Context, **chosen: Any) -> None:
    """Tokens a second of a whole model, reading a prompt (pp) and writing (tg), beside eager
    PyTorch and transformers, as a share of what this machine can do. Exit status 1 if a result
    was wrong or this project's failed."""
    from gemma_fast.benchmarks.model.providers import PROVIDERS

    refuse_unknown(chosen["only"], PROVIDERS)
    make_folder(chosen["out"])
    context.exit(0 if run_model(**chosen) else 1)


def make_folder(out: Path | None) -> None:
    try:
        if out:
            out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"--out {out}: {error}") from error


def refuse_unknown(only: Iterable[str], known: Iterable[str]) -> None:
    if unknown := [name for name in only if name not in known]:
        choices = ", ".join(known)
        raise click.UsageError(f"no provider {', '.join(unknown)}: choose from {choices}")


def pick_device(dtype: str | None) -> tuple[torch.device, torch.dtype]:
    import torch

    cuda = torch.cuda.is_available()
    kind = getattr(torch, dtype or ("bfloat16" if cuda else "float32"))
    return torch.device("cuda" if cuda else "cpu"), kind


def run_model(
    *, prompts: Sequence[int], new: Sequence[int], depths: Sequence[int], batches: Sequence[int],
    repeats: int, model: str | None, dtype: str | None, only: Sequence[str], output: str,
    out: Path | None, commit: str | None, roof: Roof | None = None,
) -> bool:  # fmt: skip
    """Measures, prints and writes; whether all is well. roof: measured already."""
    import torch

    from gemma_fast.benchmarks.kernels.suite import serious, with_took
    from gemma_fast.benchmarks.measure.machine import measure_again, measure_roof, stamp
    from gemma_fast.benchmarks.model.cases import cases, find
    from gemma_fast.benchmarks.model.judge import Judge
    from gemma_fast.benchmarks.model.plots import plot
    from gemma_fast.benchmarks.model.providers import PROVIDERS
    from gemma_fast.benchmarks.model.race import Result, run
    from gemma_fast.benchmarks.model.report import Report
    from gemma_fast.load import refuse_overflow

    device, kind = pick_device(dtype)
    cuda = device.type == "cuda"
    name = model or ("gemma-2b" if cuda else "tiny")
    tests = cases(prompts, new, depths, batches)
    if not tests:
        raise click.UsageError("nothing to test: -p and -n are 0")
    try:
        checkpoint = find(name)
        refuse_overflow(checkpoint.config, kind)
    except (ValueError, OSError, ImportError) as error:
        raise click.ClickException(str(error)) from error
    fitting = [case for case in tests if case.fits(checkpoint.config)]
    if not fitting:
        context = checkpoint.config.max_position_embeddings
        raise click.UsageError(f"no test fits the context of {name}, {context} tokens")
    roof = roof or (measure_roof(device, kind) if model or cuda else None)
    try:
        judge = Judge(checkpoint, kind, device)
    except torch.OutOfMemoryError as error:
        raise click.ClickException(f"no memory for the reference that judges: {error}") from error
    head = stamp(device, kind, ["transformers"], commit)
    about = {
        "model": name, "params": checkpoint.config.num_parameters, "dtype": head["dtype"],
        "size_bytes": checkpoint.config.num_parameters * kind.itemsize, "checked": judge.about,
    }  # fmt: skip
    names = [name for name in PROVIDERS if name in only or not only]
    results: list[Result] = []
    report = Report(head, roof, about, results)
    for result in with_took(run(checkpoint, tests, device, kind, roof, repeats, names, judge)):
        results.append(result)
        about["checked"] = judge.about
        case = result.case
        told = f"{case.name}, batch {case.batch}: {result.provider}: {result.status}"
        if rate := result.figures(roof).get("tokens_per_s"):
            told += f", {rate:.2f} t/s"
        click.echo(f"{told}, {result.took:.1f} s", err=True)
        if out:  # so that a run cut short keeps what it has
            report.write(out)
    if roof:
        measure_again(head, device, kind)
    if out:
        report.write(out)
        title = f"{name}, {head['dtype']}, {head['gpu'] or head['cpu']}"
        measured = roof if any(r.seconds for r in results) else None
        write_plots(plot, out, measured, report.results, title)
    click.echo(report.json() if output == "json" else report.markdown(), nl=False)
    return not serious(r for r in results if r.case in fitting)


def write_plots(
    plot: Callable[..., None], out: Path, roof: Roof | None, results: Sequence[Any], title: str
) -> None:
    """Without a roof nothing was measured."""
    if roof is None:
        click.echo(f"{out}: results.json, results.md. No plots: nothing was measured.", err=True)
        return
    try:
        plot(out, roof, results, title)
    except ImportError as error:
        click.echo(f"No plots: {error}", err=True)
