"""Figures of what was measured: of kernels and of whole models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from gemma_fast.benchmarks.measure.machine import Roof
from gemma_fast.benchmarks.measure.outcome import COPY, OURS
from gemma_fast.benchmarks.measure.report import speedups

Plots = Iterator[tuple[str, Any]]  # a file's name and its figure
STYLES: dict[str, dict[str, Any]] = {
    OURS: {"linewidth": 2.5, "color": "black", "zorder": 3},
    COPY: {"linestyle": "--", "color": "grey"},
}


def write_plots(
    plots: Callable[[Roof, Sequence[Any]], Plots], folder: Path, roof: Roof | None,
    results: Sequence[Any], title: str,
) -> None:  # fmt: skip
    """Writes kernel_plots or model_plots of the measured results; says so where there are none, and
    where matplotlib is missing."""
    measured = [r for r in results if r.typical]
    if roof is None or not measured:
        click.echo(f"{folder}: results.json, results.md. No plots: nothing was measured.", err=True)
        return
    try:
        import matplotlib

        matplotlib.use("Agg")  # no display needed
    except ImportError as error:
        click.echo(f"No plots: {error}", err=True)
        return
    for name, figure in plots(roof, measured):
        figure.suptitle(title, fontsize="small", wrap=True)
        figure.savefig(folder / f"{name}.png", dpi=120)


def kernel_plots(roof: Roof, results: Sequence[Any]) -> Plots:
    if speedups(results):
        yield "speedup", _speedup(results)
    yield "roofline", _roofline(roof, results)


def model_plots(roof: Roof, results: Sequence[Any]) -> Plots:
    """Against depth and batch where there are several."""
    yield "speed", _speed(roof, results)
    written = [r for r in results if r.case.kind == "tg"]
    for name, other in (("depth", "batch"), ("batch", "depth")):
        if len({getattr(r.case, name) for r in written}) > 1:
            least = min((getattr(r.case, other), r.case.tokens) for r in written)
            chosen = [r for r in written if (getattr(r.case, other), r.case.tokens) == least]
            yield name, _step_time(roof, chosen, name)


def _canvas(width: float, height: float, lines: int = 1, columns: int = 1) -> tuple[Any, list[Any]]:
    """A figure and its panels, line by line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(lines, columns, squeeze=False).flat)


def _plot_lines(panel: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """A line for each provider through its points (provider, x, y)."""
    for provider in dict.fromkeys(name for name, _, _ in points):
        xs, ys = zip(*sorted((x, y) for name, x, y in points if name == provider), strict=True)
        style = STYLES.get(provider, {"linewidth": 1.2})
        panel.plot(xs, ys, marker="o", label=provider, **style)


def _speedup(results: Sequence[Any]) -> Any:
    """A panel a suite: sizes across, times eager's speed upwards, a line a provider."""
    factors = speedups(results)
    suites = list(dict.fromkeys(suite for (suite, _), _ in factors))
    columns = min(len(suites), 2)
    lines = math.ceil(len(suites) / columns)
    figure, panels = _canvas(9 * columns, 3.8 * lines + 0.6, lines, columns)
    for suite, panel in zip(suites, panels, strict=False):
        keys = [(size, provider) for (name, size), provider in factors if name == suite]
        sizes = list(dict.fromkeys(size for size, _ in keys))
        _plot_lines(panel, [(p, sizes.index(size), factors[(suite, size), p]) for size, p in keys])
        panel.set_xticks(range(len(sizes)), sizes, rotation=20, ha="right", fontsize="x-small")
        panel.set(title=suite, ylabel="× eager", ylim=(0, None))
        panel.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
        panel.grid(alpha=0.3)
    for unused in panels[len(suites) :]:
        unused.set_axis_off()
    return figure


def _roofline(roof: Roof, results: Sequence[Any]) -> Any:
    """FLOP/s over FLOPs a byte, under the copy's slope and the product's ceiling; ours large."""
    figure, (panel,) = _canvas(9, 6)
    measured = [r for r in results if r.work.flops]
    ridge = roof.product / roof.copy
    intensities = [r.work.flops / r.work.bytes for r in measured] + [ridge]
    ends = [min(intensities) / 2, ridge, max(intensities) * 2]
    ceiling = [min(x * roof.copy, roof.product) / 1e12 for x in ends]
    panel.loglog(ends, ceiling, color="black", label="roof: copy, product")
    suites = list(dict.fromkeys(r.suite for r in measured))
    for i, suite in enumerate(suites):
        for ours in (False, True):
            chosen = [r for r in measured if r.suite == suite and (r.provider == OURS) == ours]
            xs = [r.work.flops / r.work.bytes for r in chosen]
            ys = [r.work.flops / r.typical / 1e12 for r in chosen]
            style = {"s": 60, "marker": "*"} if ours else {"s": 12, "alpha": 0.5}
            label = f"{suite}, {OURS}" if ours else f"{suite}, others"
            panel.scatter(xs, ys, color=f"C{i}", label=label, **style)
    panel.set(xlabel="arithmetic intensity, FLOPs a byte", ylabel="TFLOP/s")
    panel.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    panel.grid(alpha=0.3, which="both")
    return figure


def _speed(roof: Roof, results: Sequence[Any]) -> Any:
    """A panel a kind of test: tests across, a bar a provider."""
    kinds = [kind for kind in ("pp", "tg") if any(r.case.kind == kind for r in results)]
    figure, panels = _canvas(9 * len(kinds), 5, columns=len(kinds))
    names = list(dict.fromkeys(r.provider for r in results))
    for kind, panel in zip(kinds, panels, strict=True):
        cases = list(dict.fromkeys(r.case for r in results if r.case.kind == kind))
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            chosen = [r for r in results if r.provider == name and r.case.kind == kind]
            figures = [r.figures(roof) for r in chosen]
            xs = [cases.index(r.case) + (i - (len(names) - 1) / 2) * width for r in chosen]
            rates = [x["tokens_per_s"] for x in figures]
            deviations = [x["tokens_per_s_sd"] or 0 for x in figures]
            color = "black" if name == OURS else f"C{i}"
            panel.bar(xs, rates, width, yerr=deviations, label=name, color=color, ecolor="grey")
        batches = len({case.batch for case in cases}) > 1
        labels = [case.name + f", batch {case.batch}" * batches for case in cases]
        panel.set_xticks(range(len(cases)), labels, rotation=20, ha="right", fontsize="x-small")
        title = {"pp": "reading a prompt", "tg": "writing"}[kind]
        panel.set(title=title, ylabel="tokens/s", ylim=(0, None))
        panel.grid(alpha=0.3, axis="y")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _step_time(roof: Roof, results: Sequence[Any], name: str) -> Any:
    """A step's mean time upwards, a line a provider; below, what the roof allows."""
    figure, (panel,) = _canvas(9, 5)
    floors = {getattr(r.case, name): roof.floor(r.work) / r.case.tokens * 1e3 for r in results}
    steps = [(r.provider, getattr(r.case, name), r.typical / r.case.tokens) for r in results]
    _plot_lines(panel, [(provider, x, seconds * 1e3) for provider, x, seconds in steps])
    values = sorted(floors)
    panel.plot(values, [floors[x] for x in values], color="grey", linestyle="--", label="roof")
    panel.set_xscale("symlog", base=2, linthresh=min(value for value in values if value))  # has 0
    panel.set_xticks(values, [str(value) for value in values])
    panel.minorticks_off()
    panel.set_yscale("log")
    several = any(r.case.batch > 1 for r in results)
    panel.set(xlabel=name, ylabel="ms a step" if several else "ms a token")
    panel.legend(fontsize="x-small")
    panel.grid(alpha=0.3)
    return figure
