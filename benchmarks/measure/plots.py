"""Draws plots of measured results, for kernels and for whole models, with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from gemma_fast.benchmarks.measure.machine import Roof
from gemma_fast.benchmarks.measure.outcome import COPY, OURS, UNPACKED
from gemma_fast.benchmarks.measure.report import rates, speedups

DPI = 160
Plots = Iterator[tuple[str, Any]]  # (name of the file, matplotlib figure)
ACCENT, MUTED, PALE, INK = "#1f5fbf", "#9aa4b0", "#e9ecf0", "#24292f"  # on a white background
STYLES: dict[str, dict[str, Any]] = {
    OURS: {"linewidth": 2.5, "color": "black", "zorder": 3},
    COPY: {"linestyle": "--", "color": "grey"},
}


def write_plots(
    plots: Callable[[Roof, Sequence[Any]], Plots], folder: Path, roof: Roof | None,
    results: Sequence[Any], title: str,
) -> None:  # fmt: skip
    """Writes the plots of the measured results to the folder. plots: kernel_plots or model_plots.

    Prints a message instead if nothing was measured or matplotlib is missing.
    """
    measured = [r for r in results if r.typical]
    if roof is None or not measured:
        click.echo(f"{folder}: results.json, results.md. No plots: nothing was measured.", err=True)
        return
    try:
        import matplotlib

        matplotlib.use("Agg")  # this backend needs no display
    except ImportError as error:
        click.echo(f"No plots: {error}", err=True)
        return
    for name, figure in plots(roof, measured):
        figure.suptitle(title, fontsize="small", wrap=True)
        figure.savefig(folder / f"{name}.png", dpi=DPI)


def kernel_plots(roof: Roof, results: Sequence[Any]) -> Plots:
    if speedups(results):
        yield "speedup", _speedup(results)
    yield "roofline", _roofline(roof, results)


def model_plots(roof: Roof, results: Sequence[Any]) -> Plots:
    """Yields a plot of the speed of each test. If the results have several depths, also yields a
    plot of a decode step's time by depth. Does the same for batch sizes."""
    yield "speed", _speed(roof, results)
    written = [r for r in results if r.case.kind == "tg"]
    for name, other in (("depth", "batch"), ("batch", "depth")):
        if len({getattr(r.case, name) for r in written}) > 1:
            least = min((getattr(r.case, other), r.case.tokens) for r in written)
            chosen = [r for r in written if (getattr(r.case, other), r.case.tokens) == least]
            yield name, _step_time(roof, chosen, name)


def _canvas(
    width: float, height: float, lines: int = 1, columns: int = 1, **options: Any
) -> tuple[Any, list[Any]]:
    """Returns a figure and its panels, row by row. options: keywords of matplotlib's subplots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, list(figure.subplots(lines, columns, squeeze=False, **options).flat)


def _plot_lines(panel: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """Draws a line for each provider. points: (provider, x, y)."""
    for provider in dict.fromkeys(name for name, _, _ in points):
        xs, ys = zip(*sorted((x, y) for name, x, y in points if name == provider), strict=True)
        style = STYLES.get(provider, {"linewidth": 1.2})
        panel.plot(xs, ys, marker="o", label=provider, **style)


def _speedup(results: Sequence[Any]) -> Any:
    """Draws a panel for each suite: speed relative to eager, by size, with a line per provider."""
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
    """Draws FLOP/s by FLOPs per byte, and the roof: a slope at the copy's rate, then a horizontal
    line at the matmul's rate. OURS has larger markers than rivals."""
    figure, (panel,) = _canvas(9, 6)
    measured = [r for r in results if r.work.flops]
    ridge = roof.product / roof.copy
    intensities = [r.work.flops / r.work.bytes for r in measured] + [ridge]
    ends = [min(intensities) / 2, ridge, max(intensities) * 2]
    ceiling = [min(x * roof.copy, roof.product) / 1e12 for x in ends]
    panel.loglog(ends, ceiling, color="black", label="roof: copy, matmul")
    suites = list(dict.fromkeys(r.suite for r in measured))
    for i, suite in enumerate(suites):
        for ours in (False, True):
            chosen = [r for r in measured if r.suite == suite and (r.provider == OURS) == ours]
            xs = [r.work.flops / r.work.bytes for r in chosen]
            ys = [r.work.flops / r.typical / 1e12 for r in chosen]
            style = {"s": 60, "marker": "*"} if ours else {"s": 12, "alpha": 0.5}
            label = f"{suite}, {OURS}" if ours else f"{suite}, others"
            panel.scatter(xs, ys, color=f"C{i}", label=label, **style)
    panel.set(xlabel="arithmetic intensity, FLOPs per byte", ylabel="TFLOP/s")
    panel.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    panel.grid(alpha=0.3, which="both")
    return figure


def _speed(roof: Roof, results: Sequence[Any]) -> Any:
    """Draws a panel for each kind of test, with a group for each test and a bar for each provider.
    A pale bar behind each bar shows the speed at the roof, except at an arrival."""
    groups: dict[str, dict[Any, list[Any]]] = {"pp": {}, "tg": {}, "arrival": {}}
    for r in results:
        groups[r.case.kind].setdefault(r.case, []).append(r)
    kinds = [cases for cases in groups.values() if cases]
    lines = [sum(1 + len(group) for group in cases.values()) for cases in kinds]
    height = 0.24 * sum(lines) + 0.2 * len(kinds) + 0.6
    figure, panels = _canvas(9, height, len(kinds), height_ratios=lines)
    for cases, panel in zip(kinds, panels, strict=True):
        ticks: dict[float, str] = {}
        longest, y = 0.0, 0.0
        for case, group in cases.items():
            panel.text(0, y, _words(case), va="center", weight="bold")
            for i, r in enumerate(group, 1):
                longest = max(longest, _bar(panel, y + i, r, roof))
                ticks[y + i] = r.label
            y += len(group) + 1.2
        panel.set_yticks([*ticks], [*ticks.values()])
        panel.tick_params(axis="y", length=0)
        panel.set(xticks=[], xlim=(0, longest), ylim=(y - 0.6, -0.6))
        panel.spines[["top", "right", "bottom"]].set_visible(False)
    if not groups["arrival"]:
        told = f"Pale bars: the roof, which this run measured: {rates(roof)}."
        figure.supxlabel(told, fontsize="small")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    return figure


def _bar(panel: Any, y: float, result: Any, roof: Roof) -> float:
    """Draws a result and its roof, with labels. Returns the width that they need, as an x value."""
    figures, ours = result.figures(roof), result.provider in (OURS, UNPACKED)
    rate, share = figures["tokens_per_s"], figures.get("mfu", figures.get("mbu"))
    deviation = figures["tokens_per_s_sd"] or 0
    most = rate / share if share else rate
    panel.barh(y, most, 0.84, color=PALE)
    panel.barh(
        y, rate, 0.84, color=ACCENT if ours else MUTED,
        xerr=deviation, ecolor=INK, error_kw={"linewidth": 1},
    )  # fmt: skip
    told = f"{rate:.3g} tokens/s" if rate < 100 else f"{rate:.0f} tokens/s"
    told += f", {share:.0%} of the roof" if share else ""
    panel.annotate(
        told, (rate + deviation, y), (6, 0),
        textcoords="offset points", va="center", color=INK, weight="bold" if ours else "normal",
    )  # fmt: skip
    return max(most, 1.6 * rate)


def _words(case: Any) -> str:
    """Returns a test's name and its meaning in words."""
    if case.kind == "arrival":
        return f"{case.name}: prompts of up to {case.longest} tokens, batch {case.batch}"
    verb = f"prompt of {case.tokens} tokens" if case.kind == "pp" else f"{case.tokens} new tokens"
    after = f", after {case.depth}" if case.depth else ""
    batch = f", batch {case.batch}" if case.batch > 1 else ""
    return f"{case.name}: {verb}{after}{batch}"


def _step_time(roof: Roof, results: Sequence[Any], name: str) -> Any:
    """Draws the median time of a decode step, with a line per provider and one for the roof.

    name: "depth" or "batch", the x axis
    """
    figure, (panel,) = _canvas(9, 5)
    floors = {
        getattr(r.case, name): roof.of(r.dtype).floor(r.work) / r.case.tokens * 1e3 for r in results
    }
    steps = [(r.label, getattr(r.case, name), r.typical / r.case.tokens) for r in results]
    _plot_lines(panel, [(provider, x, seconds * 1e3) for provider, x, seconds in steps])
    values = sorted(floors)
    panel.plot(values, [floors[x] for x in values], color="grey", linestyle="--", label="roof")
    # A symlog axis, because a depth may be 0.
    panel.set_xscale("symlog", base=2, linthresh=min(value for value in values if value))
    panel.set_xticks(values, [str(value) for value in values])
    panel.minorticks_off()
    panel.set_yscale("log")
    several = any(r.case.batch > 1 for r in results)
    panel.set(xlabel=name, ylabel="ms per step" if several else "ms per token")
    panel.legend(fontsize="x-small")
    panel.grid(alpha=0.3)
    return figure
