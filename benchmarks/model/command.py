"""Runs `gemma-fast bench`: the speed of a whole model, compared with rivals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import torch

from gemma_fast.benchmarks.measure import machine
from gemma_fast.benchmarks.measure.machine import Roof
from gemma_fast.benchmarks.measure.outcome import serious, with_took
from gemma_fast.benchmarks.measure.plots import model_plots, title_of, write_plots
from gemma_fast.benchmarks.measure.report import model_report
from gemma_fast.benchmarks.model.cases import cases, find, is_packed
from gemma_fast.benchmarks.model.judge import Judge
from gemma_fast.benchmarks.model.providers import BESIDE_PACKED, PROVIDERS
from gemma_fast.benchmarks.model.race import ModelResult, run
from gemma_fast.checkpoint.rounded import with_quantize
from gemma_fast.load import model_dtype, refuse_overflow


def run_model(
    *, prompts: Sequence[int], new: Sequence[int], depths: Sequence[int], batches: Sequence[int],
    repeats: int, model: str | None, dtype: str | None, only: Sequence[str], output: str,
    out: Path | None, commit: str | None, quantize: str | None = None, roof: Roof | None = None,
) -> bool:  # fmt: skip
    """Measures the model, prints the results and writes them to the folder `out`.

    Returns whether the run passed (see outcome.serious). roof: the machine's roof, if it has been
    measured already
    """
    device, kind = machine.device_and_dtype(dtype)
    cuda = device.type == "cuda"
    name = model or ("gemma-2b" if cuda else "tiny")
    tests = cases(prompts, new, depths, batches)
    if not tests:
        raise click.UsageError("nothing to test: -p and -n are 0")
    try:
        checkpoint = with_quantize(find(name), quantize, device)
        packed = is_packed(checkpoint)
        if packed and not dtype:
            kind = model_dtype("auto", checkpoint, device)
        refuse_overflow(checkpoint.config, kind)
    except (ValueError, OSError, ImportError) as error:
        raise click.ClickException(str(error)) from error
    fitting = [case for case in tests if case.status(checkpoint.config) == "ok"]
    if not fitting:
        context = checkpoint.config.max_position_embeddings
        raise click.UsageError(f"no test fits the context of {name}, {context} tokens")
    roof = roof or (machine.measure_roof(device, kind) if model or cuda else None)
    try:
        judge = Judge(checkpoint, kind, device)
    except torch.OutOfMemoryError as error:
        raise click.ClickException(f"not enough memory for the reference: {error}") from error
    head = machine.stamp(device, kind, ["transformers"], commit)
    about = {
        "model": name, "params": checkpoint.config.num_parameters, "dtype": head["dtype"],
        "size_bytes": checkpoint.config.num_parameters * kind.itemsize, "checked": judge.about,
    }  # fmt: skip
    usual = [name for name in PROVIDERS if packed or name not in BESIDE_PACKED]
    names = [name for name in PROVIDERS if name in (only or usual)]
    results: list[ModelResult] = []
    for result in with_took(run(checkpoint, tests, device, kind, roof, repeats, names, judge)):
        results.append(result)
        about["checked"] = judge.about
        case = result.case
        told = f"{case.name}, batch {case.batch}: {result.provider}: {result.status}"
        if rate := result.figures(roof).get("tokens_per_s"):
            told += f", {rate:.2f} t/s"
        click.echo(f"{told}, {result.took:.1f} s", err=True)
        if out:  # written each time, so that an interrupted run keeps its results
            model_report(head, roof, results, about).write(out)
    if roof:
        machine.measure_again(head, device, kind)
    report = model_report(head, roof, results, about)
    if out:
        report.write(out)
        write_plots(model_plots, out, roof, results, title_of(head, name))
    click.echo(report.json if output == "json" else report.markdown, nl=False)
    return not serious(r for r in results if r.case in fitting)
