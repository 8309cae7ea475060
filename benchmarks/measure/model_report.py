"""Makes results.json, results.md and the README's table of a whole model's results.

A `row` is the JSON entry of one result; table cells are made from rows.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gemma_fast.benchmarks.measure import load
from gemma_fast.benchmarks.measure.machine import Roof
from gemma_fast.benchmarks.measure.outcome import (
    EAGER,
    GENERATE_BATCH,
    LLAMA_CPP,
    ONE_BY_ONE,
    TRANSFORMERS,
    WITHOUT_GRAPHS,
)
from gemma_fast.benchmarks.measure.report import (
    Report,
    as_json,
    entries,
    found_json,
    markdown,
    milliseconds,
    table,
)

SAME = "the row's own dtype"
# Column → its key in results.json, and the provider and dtype whose speed is 1. llama.cpp has no
# dtype. Ratios to a rival in float32 stand beside other dtypes only.
RATIOS = {
    "× eager": ("x_eager", EAGER, SAME),
    "× transformers": ("x_transformers", TRANSFORMERS, SAME),
    "× transformers, float32": ("x_transformers_float32", TRANSFORMERS, "float32"),
    "× llama.cpp": ("x_llama_cpp", LLAMA_CPP, None),
    "× one by one": ("x_one_by_one", ONE_BY_ONE, SAME),
    "× generate_batch": ("x_generate_batch", GENERATE_BATCH, SAME),
    "× generate_batch, float32": ("x_generate_batch_float32", GENERATE_BATCH, "float32"),
}
COLUMNS = {
    "test": "---", "provider": "---", "dtype": "---", "batch": "---:", "t/s": "---:",
    "total": "---:", **dict.fromkeys(RATIOS, "---:"), "first token": "---:",
    "p50 / p99 of a token": "---:", "size": "---:", "bytes a token": "---:", "memory": "---:",
    "of roof": "---:",
}  # fmt: skip
FOOTNOTE = (
    "t/s: tokens of the whole batch, divided by the median time of the repeats, ± sd of the "
    "repeats' rates. × transformers: t/s divided by those of transformers (sdpa) in the same test "
    "and dtype. First token and of roof use the same median; p50 and p99 come from one more pass. "
    "Steps are timed without reading tokens back; generate() reads each token one step later. "
    "First token: time of the prefill until the first new token. Bytes a token: weights and "
    "visible keys and values, divided by the tokens of the whole batch. Of roof, for decoding: "
    "these bytes per second, divided by the rate of the copy (MBU); it may exceed 1, because reads "
    "alone can be faster than a copy. Of roof, for prefill: FLOP/s divided by those of the matmul "
    "in the same dtype (MFU)."
)
ARRIVALS = (
    "t/s: new tokens of all texts, divided by the median total time of the repeats, ± sd of the "
    "repeats' rates. Total: time from the first prompt to the last token, all prompts included. "
    "The prompts have different lengths, of the tokens after pp at most; batch: texts at the same "
    "time. All providers read each token back."
)
MIXTURE = (
    "Bytes and FLOPs of a mixture of experts are those of the experts that the tokens choose: of "
    "several tokens, the average number of experts if all are equally probable."
)
NO_GRAPHS = "\\* Inductor skipped CUDA graphs."


def model_report(
    stamp: Mapping[str, Any], roof: Roof | None, results: Sequence[Any], about: Mapping[str, Any]
) -> Report:
    """Returns the report on a model. Rows are sorted by test, then by provider, in the order of the
    run.

    results: ModelResult
    about: "model", "params", "active_params" and "checked" (sentences that describe the run)
    """
    place = list(dict.fromkeys(r.case for r in results)).index
    same = {key: about[key] for key in ("model", "params", "active_params")}
    rows = [
        {
            **same, "size_bytes": r.size_bytes, "dtype": r.dtype, "test": r.case.name,
            **asdict(r.case), **entries(r, roof),
        }
        for r in sorted(results, key=lambda r: place(r.case))
    ]  # fmt: skip
    add_ratios(rows)
    found = found_json(stamp, roof, {"checked": about["checked"]}, rows)
    return Report(as_json(found), model_markdown(found))


def add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Adds to each timed row its speed relative to the rivals that were timed in the same test."""
    timed = [row for row in rows if "tokens_per_s" in row]
    rates = {(*_test(x), x["provider"], x["dtype"]): x["tokens_per_s"] for x in timed}
    for row in timed:
        for key, provider, dtype in RATIOS.values():
            if dtype == row["dtype"] is not None:
                continue
            base = rates.get((*_test(row), provider, row["dtype"] if dtype is SAME else dtype))
            if base:
                row[key] = row["tokens_per_s"] / base


def _test(row: Mapping[str, Any]) -> tuple[str, int]:
    return row["test"], row["batch"]


def model_markdown(found: Mapping[str, Any]) -> str:
    """Returns results.md. found: the content of model_report's results.json"""
    rows = found["results"]
    batches = any(row["batch"] > 1 for row in rows)
    columns = {k: v for k, v in COLUMNS.items() if batches or k != "batch"}
    parts = [_model(rows[0])] if rows else []
    parts += [table(columns, map(model_cells, rows))]
    kinds = {row["kind"] for row in rows if found["roof"]}
    parts += [FOOTNOTE] * bool(kinds - {"arrival"}) + [ARRIVALS] * ("arrival" in kinds)
    parts += [MIXTURE] * (bool(rows) and _active(rows[0]) < rows[0]["params"])
    parts += [NO_GRAPHS] * any(row["status"] == WITHOUT_GRAPHS for row in rows)
    return markdown(found, parts)


def _model(row: Mapping[str, Any]) -> str:
    told = f"{row['model']}, {row['params'] / 1e9:.2f} B parameters"
    active = _active(row)
    return f"{told}:" if active == row["params"] else f"{told}, {active / 1e9:.2f} B active:"


def _active(row: Mapping[str, Any]) -> int:
    return row.get("active_params", row["params"])  # older files have only "params"


def model_cells(row: Mapping[str, Any]) -> dict[str, str]:
    """Returns the table cells of a row, by column (COLUMNS). A result that was not timed shows its
    status in the column "t/s"."""
    cells = {
        "test": row["test"], "provider": row["provider"], "dtype": row["dtype"] or "",
        "batch": str(row["batch"]), "t/s": row["status"], "size": _size(row["size_bytes"]),
    }  # fmt: skip
    if "tokens_per_s" not in row:
        return cells
    sd = row["tokens_per_s_sd"]
    cells["t/s"] = f"{row['tokens_per_s']:.2f}" + ("" if sd is None else f" ± {sd:.2f}")
    if "total_s" in row:
        cells["total"] = f"{row['total_s']:.2f} s"
    elif "mfu" in row:
        cells["first token"] = milliseconds(row["time_to_first_token_s"])
        cells["of roof"] = f"{row['mfu']:.1%} MFU"
    else:
        times = row["token_p50_s"], row["token_p99_s"]
        cells["p50 / p99 of a token"] = " / ".join(map(milliseconds, times))
        cells["of roof"] = f"{row['mbu']:.1%} MBU"
    cells["bytes a token"] = _size(row.get("bytes_per_token"))
    cells["provider"] += " *" * (row["status"] == WITHOUT_GRAPHS)
    cells["memory"] = _size(row["peak_memory_bytes"])
    return cells | {name: _ratio(row, key) for name, (key, *_) in RATIOS.items()}


def readme_table(found: Mapping[str, Any]) -> str:
    """Returns the README's table, with its stamp: a line for each provider and dtype, whose ratios
    are in the order of the tests. found: the content of model_report's results.json"""
    rows = [row for row in found["results"] if "tokens_per_s" in row]
    tests = list(dict.fromkeys(row["test"] for row in rows))
    by_name: dict[str, dict[str, Any]] = {}
    for row in rows:
        by_name.setdefault(label(row["provider"], row["dtype"]), {})[row["test"]] = row
    first = "tokens per second"
    columns = {first: "---", **dict.fromkeys([*tests, *RATIOS], "---:")}
    lines = []
    for name, of_tests in by_name.items():
        line = {first: name} | {test: _rate(row) for test, row in of_tests.items()}
        for column, (key, *_) in RATIOS.items():
            ratios = [_ratio(of_tests.get(test, {}), key) for test in tests]
            line[column] = " / ".join(x or "–" for x in ratios) if any(ratios) else ""
        lines.append(line)
    stamp = found["stamp"]
    told = f"{title_of(stamp, rows[0]['model'])}. Ratios: {' / '.join(tests)}."
    told += f" {load.in_words(stamp['load'])}" if "load" in stamp else ""
    return f"{table(columns, lines)}\n\n{textwrap.fill(told, 120)}\n"


def title_of(stamp: Mapping[str, Any], model: str | None) -> str:
    """Returns the title of a run: model (unless None), dtypes, machine, date and commit."""
    name = "Gemma 3 270M (demo weights)" if model == "demo" else model
    where = ", ".join(filter(None, (name, stamp["dtype"], stamp["gpu"] or stamp["cpu"])))
    return f"{where} · {stamp['date']}, commit {stamp['commit'] or 'unknown'}"


def label(provider: str, dtype: str | None) -> str:
    return f"{provider}, {dtype}" if dtype else provider


def _rate(row: Mapping[str, Any]) -> str:
    rate: float = row["tokens_per_s"]
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}"


def _ratio(row: Mapping[str, Any], key: str) -> str:
    return f"{row[key]:.2f}" if key in row else ""


def _size(count: float | None) -> str:
    if count is None:
        return ""
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
