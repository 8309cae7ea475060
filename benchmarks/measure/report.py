"""Writes the results of a run as results.json, and makes results.md from it.

results.md has one table per kernel suite, or, for models, one table like llama-bench's. A `row` is
the JSON entry of one result; table cells are made from rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from gemma_fast.benchmarks.measure.machine import Roof
from gemma_fast.benchmarks.measure.outcome import EAGER, WITHOUT_GRAPHS

NOTHING = "No CUDA GPU: shapes were tiny, results were checked, nothing was measured."
CALL_BY_CALL = "\\* timed call by call, not in a CUDA graph."
NO_GRAPHS = "\\* Inductor skipped CUDA graphs."
KERNEL_COLUMNS = dict.fromkeys(
    ("size", "provider", "median (p20 … p80)", "GB/s", "TFLOP/s", "of roof", "× eager"), "---"
)
MODEL_COLUMNS = {
    "model": "---", "size": "---:", "params": "---:", "backend": "---", "provider": "---",
    "test": "---:", "batch": "---:", "t/s": "---:", "first token": "---:",
    "p50 / p99 of a token": "---:", "bytes a token": "---:", "memory": "---:", "of roof": "---:",
    "× eager": "---:",
}  # fmt: skip
MODEL_FOOTNOTE = (
    "t/s: tokens of the whole batch, divided by the mean time of the repeats, ± sd of the repeats' "
    "rates. First token, of roof and × eager use the same mean; p50 and p99 come from one more "
    "pass. Steps are timed without reading tokens back; generate() reads each token one step "
    "later. First token: time of the prefill until the first new token. Bytes a token: weights and "
    "visible keys and values, divided by the tokens of the whole batch. Of roof, for decoding: "
    "these bytes per second, divided by the rate of the copy (MBU); it may exceed 1, because reads "
    "alone can be faster than a copy. Of roof, for prefill: FLOP/s divided by the matmul's (MFU)."
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
    found = _found(stamp, roof, {}, kernel_rows(roof, results))
    return Report(as_json(found), kernel_markdown(found, about))


def kernel_markdown(found: Mapping[str, Any], about: Mapping[str, str]) -> str:
    """Returns results.md. found: the content of results.json; about: as in kernel_report"""
    rows, parts = found["results"], []
    for suite, group in groupby(rows, lambda row: row["suite"]):
        parts += [f"## {suite}", about[suite], table(KERNEL_COLUMNS, map(kernel_cells, group))]
    parts += [CALL_BY_CALL] * any(row.get("graph") is False for row in rows)
    return _markdown(found, parts)


def model_report(
    stamp: Mapping[str, Any], roof: Roof | None, results: Sequence[Any], about: Mapping[str, Any]
) -> Report:
    """Returns the report on a model. Rows are sorted by test, then by provider, in the order of the
    run.

    results: ModelResult; about: "model", "size_bytes" (of unpacked weights), "params", "dtype" and
    "checked" (a sentence that describes the check)
    """
    place = list(dict.fromkeys(r.case for r in results)).index
    same = {key: about[key] for key in ("model", "size_bytes", "params", "dtype")}
    same["backend"] = stamp["gpu"] or stamp["cpu"]
    factors = speedups(results)
    rows = [
        same
        | ({} if r.size_bytes is None else {"size_bytes": r.size_bytes})
        | {"test": r.case.name, **asdict(r.case), **_entries(r, roof, factors)}
        for r in sorted(results, key=lambda r: place(r.case))
    ]
    found = _found(stamp, roof, {"checked": about["checked"]}, rows)
    return Report(as_json(found), model_markdown(found))


def model_markdown(found: Mapping[str, Any]) -> str:
    """Returns results.md. found: the content of model_report's results.json"""
    rows = found["results"]
    batches = any(row["batch"] > 1 for row in rows)
    columns = {k: v for k, v in MODEL_COLUMNS.items() if batches or k != "batch"}
    parts = [table(columns, map(model_cells, rows))]
    parts += [MODEL_FOOTNOTE] * (found["roof"] is not None)
    parts += [NO_GRAPHS] * any(row["status"] == WITHOUT_GRAPHS for row in rows)
    return _markdown(found, parts)


def kernel_rows(roof: Roof | None, results: Sequence[Any]) -> list[dict[str, Any]]:
    factors = speedups(results)
    return [{"suite": r.suite, "size": r.size, **_entries(r, roof, factors)} for r in results]


def _entries(result: Any, roof: Roof | None, factors: Mapping[Any, float]) -> dict[str, Any]:
    """Returns the JSON entry of a result, without the keys that describe its suite or model."""
    key = result.cell, result.provider
    return {
        "provider": result.provider, "status": result.status, "error": result.error,
        "took_s": round(result.took, 2), **result.figures(roof),
        **({"x_eager": factors[key]} if key in factors else {}),
    }  # fmt: skip


def _found(
    stamp: Mapping[str, Any], roof: Roof | None, notes: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """Returns the content of results.json. notes: key → sentence about the whole run."""
    return {"stamp": stamp, "roof": roof and roof._asdict(), **notes, "results": rows}


def _markdown(found: Mapping[str, Any], parts: Sequence[str]) -> str:
    """Returns results.md: a heading with stamp and roof, then `parts`, which are paragraphs."""
    roof = found["roof"] and Roof(**found["roof"])
    first = heading(found["stamp"], roof)
    first += f" {found['checked']}" if "checked" in found else ""
    return "\n\n".join([first, *([] if roof else [NOTHING]), *parts]) + "\n"


def as_json(found: Mapping[str, Any]) -> str:
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def speedups(results: Iterable[Any]) -> dict[tuple[Any, str], float]:
    """Returns (cell, provider) → speed relative to eager, if eager was measured in this cell.

    Here a cell is the pair (suite, size) of a kernel's result, or the case of a model's result.
    """
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
        _round(row["GB_per_s"]), _round(row["TFLOP_per_s"]),
        f"{row['share_of_roof']:.2f} ({row['bound']})", _factor(row),
    )  # fmt: skip
    return cells | dict(zip(rest, figures, strict=True))


def model_cells(row: Mapping[str, Any]) -> dict[str, str]:
    """Returns the table cells of a row, by column (MODEL_COLUMNS). A result that was not timed
    shows its status in the column "t/s"."""
    cells = {
        "model": row["model"], "size": _size(row["size_bytes"]), "backend": row["backend"],
        "params": _count(row["params"]), "provider": row["provider"],
        "test": row["test"], "batch": str(row["batch"]), "t/s": row["status"],
    }  # fmt: skip
    if "tokens_per_s" not in row:
        return cells
    sd, memory = row["tokens_per_s_sd"], row["peak_memory_bytes"]
    cells["t/s"] = f"{row['tokens_per_s']:.2f}" + ("" if sd is None else f" ± {sd:.2f}")
    if "mfu" in row:
        cells["first token"] = _ms(row["time_to_first_token_s"])
        cells["of roof"] = f"{row['mfu']:.1%} MFU"
    else:
        cells["p50 / p99 of a token"] = f"{_ms(row['token_p50_s'])} / {_ms(row['token_p99_s'])}"
        cells["of roof"] = f"{row['mbu']:.1%} MBU"
    cells["bytes a token"] = _size(row["bytes_per_token"])
    cells["provider"] += " *" * (row["status"] == WITHOUT_GRAPHS)
    cells["memory"] = "" if memory is None else _size(memory)
    return cells | {"× eager": _factor(row)}


def heading(stamp: Mapping[str, Any], roof: Roof | None) -> str:
    names = ("cuda", "cudnn", "torch", "triton", "python")
    versions = [f"{name} {stamp[name]}" for name in names if stamp[name]]
    versions += [f"{name} {version}" for name, version in stamp["rivals"].items()]
    driver = [f"driver {stamp['driver']}"] if stamp["driver"] else []
    where = ", ".join([stamp["gpu"] or stamp["cpu"], *driver, *versions, stamp["dtype"]])
    text = f"{where}; commit {stamp['commit'] or 'unknown'}, {stamp['date']}."
    if roof:
        text += f" Roof of this run: {_rates(roof)}; the copy counts bytes read + written."
    if "roof_at_the_end" in stamp:
        text += f" At the end: {_rates(Roof(**stamp['roof_at_the_end']))}."
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


def _rates(roof: Roof) -> str:
    product = f"matmul {_round(roof.product / 1e12)} TFLOP/s"
    return f"copy {_round(roof.copy / 1e9)} GB/s, {product}"


def _round(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.2g}" if x < 1 else f"{x:.3g}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def _count(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e7 else f"{count / 1e6:.2f} M"
