"""What a run found, as results.json and results.md: a table a suite, and why who is not in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from gemma_fast.benchmarks.kernels.suite import EAGER, NOT_MEASURED, Result
from gemma_fast.benchmarks.measure.machine import Roof

NOTHING = "No CUDA GPU: shapes were tiny, results were checked, nothing was measured."
COLUMNS = ("size", "provider", "median (p20 … p80)", "GB/s", "TFLOP/s", "of roof", "× eager")
FOOTNOTE = "\\* timed call by call, not as the replay of a CUDA graph."


def speedups(results: Iterable[Result]) -> dict[tuple[str, str, str], float]:
    """suite, size, provider → how many times eager's speed; measured ones, where eager is."""
    times = {(r.suite, r.size, r.provider): r.times.median for r in results if r.times}
    return {
        (suite, size, provider): times[suite, size, EAGER] / median
        for (suite, size, provider), median in times.items()
        if (suite, size, EAGER) in times
    }


def nothing_measured(results: Sequence[Result]) -> bool:
    return any(r.status == NOT_MEASURED for r in results) and not any(r.times for r in results)


def rows(results: Iterable[Result], roof: Roof | None) -> list[tuple[str, ...]]:
    """A line of COLUMNS for each result."""
    results = list(results)
    factors = speedups(results)
    lines: list[tuple[str, ...]] = []
    for r in results:
        x = r.figures(roof)
        if not x:
            lines.append((r.size, r.provider, r.status, *[""] * (len(COLUMNS) - 3)))
            continue
        factor = factors.get((r.suite, r.size, r.provider))
        lines.append((
            r.size,
            r.provider if r.graph else f"{r.provider} *",
            _time(x["median_us"], x["p20_us"], x["p80_us"]),
            _round(x["GB_per_s"]),
            _round(x["TFLOP_per_s"]),
            f"{x['share_of_roof']:.2f} ({x['bound']})",
            "" if factor is None else f"{factor:.2f}",
        ))  # fmt: skip
    return lines


def _time(*microseconds: float) -> str:
    unit, scale = ("ms", 1e3) if microseconds[0] >= 1e4 else ("µs", 1)
    median, p20, p80 = (f"{x / scale:.1f}" for x in microseconds)
    return f"{median} {unit} ({p20} … {p80})"


def _round(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.2g}" if x < 1 else f"{x:.3g}"


def heading(stamp: Mapping[str, Any], roof: Roof | None) -> str:
    names = ("cuda", "cudnn", "torch", "triton", "python")
    versions = [f"{name} {stamp[name]}" for name in names if stamp[name]]
    versions += [f"{name} {version}" for name, version in stamp["rivals"].items()]
    driver = [f"driver {stamp['driver']}"] if stamp["driver"] else []
    where = ", ".join([stamp["gpu"] or stamp["cpu"], *driver, *versions, stamp["dtype"]])
    text = f"{where}; commit {stamp['commit'] or 'unknown'}, {stamp['date']}."
    if roof:
        text += f" Roof of this run: {_rates(roof)}, a copy's bytes read + written."
    if "roof_at_the_end" in stamp:
        text += f" At its end: {_rates(Roof(**stamp['roof_at_the_end']))}."
    return text


def _rates(roof: Roof) -> str:
    product = f"product {_round(roof.product / 1e12)} TFLOP/s"
    return f"copy {_round(roof.copy / 1e9)} GB/s, {product}"


def markdown(
    stamp: Mapping[str, Any], roof: Roof | None, results: Iterable[Result], about: Mapping[str, str]
) -> str:
    """about: suite → what it is, in a line."""
    results = list(results)
    parts = [heading(stamp, roof)]
    if nothing_measured(results):
        parts.append(NOTHING)
    for suite, group in groupby(results, lambda r: r.suite):
        lines = [COLUMNS, ("---",) * len(COLUMNS), *rows(group, roof)]
        table = "\n".join(f"| {' | '.join(escape(x) for x in line)} |" for line in lines)
        parts += [f"## {suite}", about[suite], table]
    if any(r.graph is False for r in results):
        parts.append(FOOTNOTE)
    return "\n\n".join(parts) + "\n"


def escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("*", "\\*")


def write(
    folder: Path, stamp: Mapping[str, Any], roof: Roof | None, results: Iterable[Result],
    about: Mapping[str, str],
) -> None:  # fmt: skip
    """results.json and results.md, of what there is so far; the folder exists."""
    results = list(results)
    factors = speedups(results)
    entries = []
    for r in results:
        entry = {
            "suite": r.suite, "size": r.size, "provider": r.provider, "status": r.status,
            "error": r.error, "took_s": round(r.took, 2), **r.figures(roof),
        }  # fmt: skip
        if (key := (r.suite, r.size, r.provider)) in factors:
            entry["x_eager"] = factors[key]
        entries.append(entry)
    found = {"stamp": stamp, "roof": roof and roof._asdict(), "results": entries}
    text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    (folder / "results.json").write_text(text, encoding="utf-8")
    table = markdown(stamp, roof, results, about)
    (folder / "results.md").write_text(table, encoding="utf-8")
