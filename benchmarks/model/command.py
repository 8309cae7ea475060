"""Runs `gemma-fast bench`: the speed of a whole model, compared with rivals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from gemma_fast.benchmarks.measure import load, machine
from gemma_fast.benchmarks.measure.machine import Roof
from gemma_fast.benchmarks.measure.model_report import model_report, title_of
from gemma_fast.benchmarks.measure.outcome import serious
from gemma_fast.benchmarks.measure.plots import model_plots, write_plots
from gemma_fast.benchmarks.model.arrival import arrivals
from gemma_fast.benchmarks.model.cases import Case, Count, cases, find, is_packed
from gemma_fast.benchmarks.model.judge import Judge
from gemma_fast.benchmarks.model.providers import BESIDE_PACKED, providers_of
from gemma_fast.benchmarks.model.race import groups, run
from gemma_fast.benchmarks.model.result import ModelResult
from gemma_fast.checkpoint.base import Checkpoint
from gemma_fast.checkpoint.rounded import with_quantize
from gemma_fast.load import model_dtype, refuse_overflow

RIVALS = ("transformers", "llama-cpp-python")


def run_model(
    *, prompts: Sequence[Count], new: Sequence[Count], depths: Sequence[int],
    batches: Sequence[int], arrival: Sequence[int], repeats: int, model: str | None,
    dtypes: Sequence[str], only: Sequence[str], output: str, out: Path | None,
    commit: str | None, quantize: str | None = None, roof: Roof | None = None,
) -> bool:  # fmt: skip
    """Measures the model, prints the results and writes them to the folder `out`.

    Returns whether the run passed (see outcome.serious). roof: the machine's roof, if it has been
    measured already
    """
    device, kind = machine.device_and_dtype(next(iter(dtypes), None))
    kinds = [getattr(torch, name) for name in dtypes] or [kind]
    cuda = device.type == "cuda"
    name = model or ("gemma-2b" if cuda else "tiny")
    tests = chosen_cases(prompts, new, depths, batches, arrival)
    try:
        checkpoint = with_quantize(find(name), quantize, device)
        packed = is_packed(checkpoint)
        if packed and not dtypes:
            kinds = [model_dtype("auto", checkpoint, device)]
        for kind in kinds:
            refuse_overflow(checkpoint.config, kind)
    except (ValueError, OSError, ImportError) as error:
        raise click.ClickException(str(error)) from error
    fitting = [case for case in tests if case.status(checkpoint.config) == "ok"]
    if not fitting:
        context = checkpoint.config.max_position_embeddings
        raise click.UsageError(f"no test fits the context of {name}, {context} tokens")
    providers = providers_of(any(arrival))
    usual = [name for name in providers if packed or name not in BESIDE_PACKED]
    roof = roof or (machine.measure_roof(device, *kinds) if model or cuda else None)
    head = machine.stamp(device, kinds, RIVALS, commit)
    about = {
        "model": name, "params": checkpoint.config.num_parameters,
        "active_params": checkpoint.config.num_active_parameters,
    }  # fmt: skip
    results = measure(
        checkpoint, tests, device, kinds, only or usual, repeats, roof, head, about, out
    )  # fmt: skip
    if roof:
        machine.measure_again(head, device, *kinds)
    report = model_report(head, roof, results, about)
    if out:
        report.write(out)
        write_plots(model_plots, out, roof, results, title_of(head, name))
    click.echo(report.json if output == "json" else report.markdown, nl=False)
    if load.is_busy(head["load"]):
        click.echo(f"Warning: {load.in_words(head['load'])}", err=True)
    return not serious(r for r in results if r.case in fitting)


def chosen_cases(
    prompts: Sequence[Count], new: Sequence[Count], depths: Sequence[int], batches: Sequence[int],
    arrival: Sequence[int],
) -> Sequence[Case]:  # fmt: skip
    """Returns the cases of the options. Raises UsageError if there is none, and for an option that
    --arrival does not have."""
    tests: Sequence[Case] = cases(prompts, new, depths, batches)
    if any(arrival):
        longest, counts = ([n for n in x if isinstance(n, int)] for x in (prompts, new))
        if any(depths) or len(longest) + len(counts) < len(prompts) + len(new):
            raise click.UsageError("--arrival has no depth: leave out -d and @")
        tests = arrivals(arrival, longest, counts, batches)
    if not tests:
        zero = "-p or -n is 0" if any(arrival) else "-p and -n are 0"
        raise click.UsageError(f"nothing to test: {zero}")
    return tests


def measure(
    checkpoint: Checkpoint, tests: Sequence[Case], device: torch.device,
    kinds: Sequence[torch.dtype], names: Sequence[str], repeats: int, roof: Roof | None,
    head: dict[str, Any], about: dict[str, Any], out: Path | None,
) -> list[ModelResult]:  # fmt: skip
    """Runs the providers and returns their results. Adds the load of the machine to `head`, and a
    description of the run to `about`."""
    try:
        judge = Judge(checkpoint, kinds[0], device, *kinds[1:])
    except torch.OutOfMemoryError as error:
        raise click.ClickException(f"not enough memory for the reference: {error}") from error
    order = groups(checkpoint.config, names, kinds, device)
    turns = "repeats of all providers take turns" if len(order) == 1 else "one provider at a time"
    watch = load.Load()
    head["load"], about["checked"] = watch.so_far(), judge.about
    results: list[ModelResult] = []
    for result in run(checkpoint, tests, device, order, roof, repeats, judge):
        results.append(result)
        head["load"] = watch.so_far()
        about["checked"] = f"{judge.about} Order: {turns}."
        case = result.case
        told = f"{case.name}, batch {case.batch}: {result.label}: {result.status}"
        if rate := result.figures(roof).get("tokens_per_s"):
            told += f", {rate:.2f} t/s"
        click.echo(f"{told}, {result.took:.1f} s", err=True)
        if out:  # written each time, so that an interrupted run keeps its results
            model_report(head, roof, results, about).write(out)
    return results
