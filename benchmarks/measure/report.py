"""Writes the results of a run as results.json, and makes results.md from it.

results.md has one table per kernel suite; model_report.py makes that of a model. A `row` is the
JSON entry of one result; table cells are made from rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from gemma_fast.benchmarks.measure import load
from gemma_fast.benchmarks.measure.machine import Roof
from gemma_fast.benchmarks.measure.outcome import EAGER

NOTHING = "No CUDA GPU: shapes were tiny, results were checked, nothing was measured."
CALL_BY_CALL = "\\* timed call by call, not in a CUDA graph."
KERNEL_COLUMNS = dict.fromkeys(
    ("size", "provider", "median (p20 … p80)", "GB/s", "TFLOP/s", "of roof", "× eager"), "---"
)


class Report(NamedTuple):
    json: str
    markdown: str

    def write(self, folder: Path) -> None:
        """Writes results.json and results.md to an existing folder."""
        (folder / "results.json").write_text(self.json, encoding="utf-8")
        (folder / "results.md").write_text(self.markdown, encoding="utf-8")


def kernel_report(
    stamp: Mapping[str, Any], roof: Roof | None, results: Sequence[Any], about: Mapping[str, str]
) -> Report:
    """Returns the report on kernels.

    results: KernelResult; about: name of the suite → its description in one line
    """
    found = found_json(stamp, roof, {}, kernel_rows(roof, results))
    return Report(as_json(found), kernel_markdown(found, about))


def kernel_markdown(found: Mapping[str, Any], about: Mapping[str, str]) -> str:
    """Returns results.md. found: the content of results.json; about: as in kernel_report"""
    rows, parts = found["results"], []
    for suite, group in groupby(rows, lambda row: row["suite"]):
        parts += [f"## {suite}", about[suite], table(KERNEL_COLUMNS, map(kernel_cells, group))]
    parts += [CALL_BY_CALL] * any(row.get("graph") is False for row in rows)
    return markdown(found, parts)


def kernel_rows(roof: Roof | None, results: Sequence[Any]) -> list[dict[str, Any]]:
    factors = speedups(results)
    rows = []
    for r in results:
        key = r.cell, r.provider
        eager = {"x_eager": factors[key]} if key in factors else {}
        rows.append({"suite": r.suite, "size": r.size, **entries(r, roof), **eager})
    return rows


def entries(result: Any, roof: Roof | None) -> dict[str, Any]:
    """Returns the JSON entry of a result, without the keys that describe its suite or model."""
    return {
        "provider": result.provider, "status": result.status, "error": result.error,
        "took_s": round(result.took, 2), **result.figures(roof),
    }  # fmt: skip


def found_json(
    stamp: Mapping[str, Any], roof: Roof | None, notes: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """Returns the content of results.json. notes: key → sentence about the whole run."""
    return {"stamp": stamp, "roof": roof and roof._asdict(), **notes, "results": rows}


def markdown(found: Mapping[str, Any], parts: Sequence[str]) -> str:
    """Returns results.md: a heading with stamp and roof, then `parts`, which are paragraphs."""
    roof = found["roof"] and Roof(**found["roof"])
    first = heading(found["stamp"], roof)
    first += f" {found['checked']}" if "checked" in found else ""
    return "\n\n".join([first, *([] if roof else [NOTHING]), *parts]) + "\n"


def as_json(found: Mapping[str, Any]) -> str:
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def speedups(results: Iterable[Any]) -> dict[tuple[Any, str], float]:
    """Returns (cell, provider) → speed relative to eager, if eager was measured in this cell, which
    is the pair (suite, size) of a kernel's result."""
    seconds = {(r.cell, r.provider): r.typical for r in results if r.typical}
    return {
        (cell, name): seconds[cell, EAGER] / typical
        for (cell, name), typical in seconds.items()
        if (cell, EAGER) in seconds
    }


def kernel_cells(row: Mapping[str, Any]) -> dict[str, str]:
    """Returns the table cells of a row, by column (KERNEL_COLUMNS). A result that was not timed
    shows its status in the time column."""
    size, provider, times, *rest = KERNEL_COLUMNS
    cells = {size: row["size"], provider: row["provider"], times: row["status"]}
    if "median_us" not in row:
        return cells
    cells[provider] += " *" * (not row["graph"])
    cells[times] = _times(row["median_us"], row["p20_us"], row["p80_us"])
    figures = (
        rounded(row["GB_per_s"]), rounded(row["TFLOP_per_s"]),
        f"{row['share_of_roof']:.2f} ({row['bound']})", _factor(row),
    )  # fmt: skip
    return cells | dict(zip(rest, figures, strict=True))


def heading(stamp: Mapping[str, Any], roof: Roof | None) -> str:
    names = ("cuda", "cudnn", "torch", "triton", "python")
    versions = [f"{name} {stamp[name]}" for name in names if stamp[name]]
    versions += [f"{name} {version}" for name, version in stamp["rivals"].items()]
    driver = [f"driver {stamp['driver']}"] if stamp["driver"] else []
    where = ", ".join([stamp["gpu"] or stamp["cpu"], *driver, *versions, stamp["dtype"]])
    text = f"{where}; commit {stamp['commit'] or 'unknown'}, {stamp['date']}."
    if roof:
        text += f" Roof of this run: {rates(roof)}; the copy counts bytes read + written."
    if "roof_at_the_end" in stamp:
        text += f" At the end: {rates(Roof(**stamp['roof_at_the_end']))}."
    if "load" in stamp:
        text += f" {load.in_words(stamp['load'])}"
    return text


def table(columns: Mapping[str, str], lines: Iterable[Mapping[str, str]]) -> str:
    """Returns a Markdown table. columns: name → alignment; lines: column → cell. A missing or empty
    cell becomes "–". Columns in which all cells are empty are left out."""
    lines = [*lines]
    columns = {k: v for k, v in columns.items() if any(line.get(k) for line in lines)}
    rows = [[*columns], [*columns.values()]]
    rows += [[escape(line.get(name) or "–") for name in columns] for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("*", "\\*")


def _factor(row: Mapping[str, Any]) -> str:
    return f"{row['x_eager']:.2f}" if "x_eager" in row else ""


def _times(*microseconds: float) -> str:
    unit, scale = ("ms", 1e3) if microseconds[0] >= 1e4 else ("µs", 1)
    median, p20, p80 = (f"{x / scale:.1f}" for x in microseconds)
    return f"{median} {unit} ({p20} … {p80})"


def rates(roof: Roof) -> str:
    """Returns the roof in words. The matmul's dtypes are named if there are several."""
    several = [f"{rounded(x / 1e12)} ({name})" for name, x in roof.products.items()]
    product = ", ".join(several) or rounded(roof.product / 1e12)
    return f"copy {rounded(roof.copy / 1e9)} GB/s, matmul {product} TFLOP/s"


def rounded(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.2g}" if x < 1 else f"{x:.3g}"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"
