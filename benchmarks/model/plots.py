"""Figures of whole models: tokens/s by provider; a step's time against depth, and against batch,
over the roof's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from gemma_fast.benchmarks.kernels.suite import OURS
from gemma_fast.benchmarks.measure.machine import Roof
from gemma_fast.benchmarks.measure.plots import save, style
from gemma_fast.benchmarks.model.cases import NEW, PROMPT, Case
from gemma_fast.benchmarks.model.race import Result


def plot(folder: Path, roof: Roof, results: Sequence[Result], title: str) -> None:
    """speed.png; depth.png and batch.png where there are several. Raises ImportError without
    matplotlib."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    measured = [r for r in results if r.seconds]
    save(_speed(roof, measured), title, folder / "speed.png")
    written = [r for r in measured if r.case.kind == NEW]
    axes: dict[str, tuple[Callable[[Case], int], Callable[[Case], int]]] = {
        "depth": (lambda case: case.depth, lambda case: case.batch),
        "batch": (lambda case: case.batch, lambda case: case.depth),
    }
    for name, (x, other) in axes.items():
        if len({x(r.case) for r in written}) > 1:
            least = min((other(r.case), r.case.tokens) for r in written)
            chosen = [r for r in written if (other(r.case), r.case.tokens) == least]
            figure = _step_time(roof, chosen, name, x)
            save(figure, title, folder / f"{name}.png")


def _speed(roof: Roof, results: Sequence[Result]) -> Any:
    """A panel a kind of test: tests across, a bar a provider."""
    from matplotlib.figure import Figure

    kinds = [kind for kind in (PROMPT, NEW) if any(r.case.kind == kind for r in results)]
    figure = Figure(figsize=(9 * len(kinds), 5), layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False).flat
    names = list(dict.fromkeys(r.provider for r in results))
    for kind, panel in zip(kinds, panels, strict=True):
        cases = list(dict.fromkeys(r.case for r in results if r.case.kind == kind))
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            chosen = [r for r in results if r.provider == name and r.case.kind == kind]
            figures = [r.figures(roof) for r in chosen]
            panel.bar(
                [cases.index(r.case) + (i - (len(names) - 1) / 2) * width for r in chosen],
                [x["tokens_per_s"] for x in figures],
                width,
                yerr=[x["tokens_per_s_sd"] or 0 for x in figures],
                label=name,
                color="black" if name == OURS else f"C{i}",
                ecolor="grey",
            )
        batches = len({case.batch for case in cases}) > 1
        labels = [case.name + f", batch {case.batch}" * batches for case in cases]
        panel.set_xticks(range(len(cases)), labels, rotation=20, ha="right", fontsize="x-small")
        title = {PROMPT: "reading a prompt", NEW: "writing"}[kind]
        panel.set(title=title, ylabel="tokens/s", ylim=(0, None))
        panel.grid(alpha=0.3, axis="y")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _step_time(roof: Roof, results: Sequence[Result], name: str, x: Callable[[Case], int]) -> Any:
    """A step's mean time upwards, a line a provider; below, what the roof allows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    panel = figure.subplots()
    floors = {x(r.case): roof.floor(r.work) / r.case.tokens * 1e3 for r in results}
    for provider in dict.fromkeys(r.provider for r in results):
        line = sorted(
            (x(r.case), fmean(r.seconds) / r.case.tokens * 1e3)
            for r in results
            if r.provider == provider
        )
        panel.plot(*zip(*line, strict=True), marker="o", label=provider, **style(provider))
    panel.plot(
        *zip(*sorted(floors.items()), strict=True), color="grey", linestyle="--", label="roof"
    )
    values = sorted(floors)
    panel.set_xscale("symlog", base=2, linthresh=min(value for value in values if value))  # has 0
    panel.set_xticks(values, [str(value) for value in values])
    panel.minorticks_off()
    panel.set_yscale("log")
    several = any(r.case.batch > 1 for r in results)
    panel.set(xlabel=name, ylabel="ms a step" if several else "ms a token")
    panel.legend(fontsize="x-small")
    panel.grid(alpha=0.3)
    return figure
