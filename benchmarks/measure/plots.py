"""Two figures of what was measured: speed-up over eager, and the roofline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma_fast.benchmarks.kernels.suite import COPY, OURS, Result
from gemma_fast.benchmarks.measure.machine import Roof
from gemma_fast.benchmarks.measure.report import speedups


def plot(folder: Path, roof: Roof, results: Sequence[Result], title: str) -> None:
    """speedup.png and roofline.png; `results` has measured ones. Raises ImportError without
    matplotlib."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    if speedups(results):
        save(_speedup(results), title, folder / "speedup.png")
    save(_roofline(roof, results), title, folder / "roofline.png")


def save(figure: Any, title: str, file: Path) -> None:
    figure.suptitle(title, fontsize="small", wrap=True)
    figure.savefig(file, dpi=120)


def style(provider: str) -> dict[str, Any]:
    """Our line stands out, the yardstick is no rival."""
    if provider == OURS:
        return {"linewidth": 2.5, "color": "black", "zorder": 3}
    return {"linestyle": "--", "color": "grey"} if provider == COPY else {"linewidth": 1.2}


def _speedup(results: Sequence[Result]) -> Any:
    """A panel a suite: sizes across, times eager's speed upwards, a line a provider."""
    from matplotlib.figure import Figure

    factors = speedups(results)
    suites = list(dict.fromkeys(suite for suite, _, _ in factors))
    columns = min(len(suites), 2)
    lines = math.ceil(len(suites) / columns)
    figure = Figure(figsize=(9 * columns, 3.8 * lines + 0.6), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for suite, panel in zip(suites, panels, strict=False):
        keys = [key for key in factors if key[0] == suite]
        sizes = list(dict.fromkeys(size for _, size, _ in keys))
        for provider in dict.fromkeys(provider for _, _, provider in keys):
            found = [size for size in sizes if (suite, size, provider) in factors]
            at = [sizes.index(size) for size in found]
            ys = [factors[suite, size, provider] for size in found]
            panel.plot(at, ys, marker="o", label=provider, **style(provider))
        panel.set_xticks(range(len(sizes)), sizes, rotation=20, ha="right", fontsize="x-small")
        panel.set(title=suite, ylabel="× eager", ylim=(0, None))
        panel.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
        panel.grid(alpha=0.3)
    for unused in panels[len(suites) :]:
        unused.set_axis_off()
    return figure


def _roofline(roof: Roof, results: Sequence[Result]) -> Any:
    """FLOP/s over FLOPs a byte, under the copy's slope and the product's ceiling; ours large."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    panel = figure.subplots()
    measured = [r for r in results if r.times and r.work.flops]
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
            ys = [r.work.flops / r.times.median / 1e12 for r in chosen if r.times]
            style = {"s": 60, "marker": "*"} if ours else {"s": 12, "alpha": 0.5}
            label = f"{suite}, {OURS}" if ours else f"{suite}, others"
            panel.scatter(xs, ys, color=f"C{i}", label=label, **style)
    panel.set(xlabel="arithmetic intensity, FLOPs a byte", ylabel="TFLOP/s")
    panel.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    panel.grid(alpha=0.3, which="both")
    return figure
