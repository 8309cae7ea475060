"""What a run of whole models found: a table like llama-bench's, and JSON, an object a row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_fast.benchmarks.kernels.suite import EAGER
from gemma_fast.benchmarks.measure.machine import Roof
from gemma_fast.benchmarks.measure.report import NOTHING, escape, heading
from gemma_fast.benchmarks.model.cases import PROMPT
from gemma_fast.benchmarks.model.providers import PROVIDERS
from gemma_fast.benchmarks.model.race import WITHOUT_GRAPHS, Result

COLUMNS = {
    "model": "---", "size": "---:", "params": "---:", "backend": "---", "provider": "---",
    "test": "---:", "batch": "---:", "t/s": "---:", "first token": "---:",
    "p50 / p99 of a token": "---:", "bytes a token": "---:", "memory": "---:", "of roof": "---:",
    "× eager": "---:",
}  # fmt: skip
FOOTNOTE = (
    "t/s: tokens of the whole batch over the mean of the repeats, ± sd of the repeats' rates; "
    "first token, of roof and × eager come from that mean, p50 and p99 from one more pass. Steps "
    "are timed without reading tokens back; generate() reads them one step behind. First token: a "
    "prompt until a token is chosen. Bytes a token: weights and visible keys and values, over the "
    "tokens of the whole batch. Of roof: those bytes over the copy (MBU), whose roof reads alone "
    "can pass; a prompt's FLOPs over the product (MFU)."
)
NO_GRAPHS = "\\* Inductor skipped CUDA graphs."


class Report:
    """Of one model on one machine.

    about: "model", "size_bytes", "params", "dtype", "checked" (against what); results may grow.
    """

    def __init__(
        self, stamp: Mapping[str, Any], roof: Roof | None, about: Mapping[str, Any],
        results: Sequence[Result],
    ) -> None:  # fmt: skip
        self.stamp, self.roof, self.about, self._results = stamp, roof, about, results

    @property
    def results(self) -> list[Result]:
        """By batch, depth and test, then by provider."""
        cases = list(dict.fromkeys(r.case for r in self._results))
        names = list(PROVIDERS)
        return sorted(self._results, key=lambda r: (cases.index(r.case), names.index(r.provider)))

    def rows(self) -> list[dict[str, Any]]:
        """An object a row, raw samples with it."""
        eager = {r.case: mean_rate(r, self.roof) for r in self.results if r.provider == EAGER}
        rows = []
        for r in self.results:
            figures = r.figures(self.roof)
            row = {
                **{key: self.about[key] for key in ("model", "size_bytes", "params", "dtype")},
                "backend": self.stamp["gpu"] or self.stamp["cpu"],
                "test": r.case.name, "kind": r.case.kind, "tokens": r.case.tokens,
                "depth": r.case.depth, "batch": r.case.batch, "provider": r.provider,
                "status": r.status, "error": r.error, "took_s": round(r.took, 2), **figures,
            }  # fmt: skip
            if figures:
                row |= {
                    "samples_s": r.seconds, "token_samples_s": r.token_seconds,
                    "peak_memory_bytes": r.peak_bytes, "memory": r.memory,
                }  # fmt: skip
                if base := eager.get(r.case):
                    row["x_eager"] = figures["tokens_per_s"] / base
            rows.append(row)
        return rows

    def json(self) -> str:
        found = {
            "stamp": self.stamp, "roof": self.roof and self.roof._asdict(),
            "checked": self.about["checked"], "results": self.rows(),
        }  # fmt: skip
        return json.dumps(found, indent=2, ensure_ascii=False) + "\n"

    def markdown(self) -> str:
        rows = self.rows()
        batches = any(row["batch"] > 1 for row in rows)
        columns = [name for name in COLUMNS if batches or name != "batch"]
        lines = [columns, [COLUMNS[name] for name in columns]]
        lines += [[cells(row)[name] for name in columns] for row in rows]
        table = "\n".join(f"| {' | '.join(map(escape, line))} |" for line in lines)
        parts = [heading(self.stamp, self.roof) + " " + self.about["checked"]]
        if self.roof is None:
            return "\n\n".join([*parts, NOTHING, table]) + "\n"
        parts += [table, FOOTNOTE]
        if any(row["status"] == WITHOUT_GRAPHS for row in rows):
            parts.append(NO_GRAPHS)
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path) -> None:
        """results.json and results.md, of what there is so far; the folder exists."""
        (folder / "results.json").write_text(self.json(), encoding="utf-8")
        (folder / "results.md").write_text(self.markdown(), encoding="utf-8")


def mean_rate(result: Result, roof: Roof | None) -> float | None:
    return result.figures(roof).get("tokens_per_s")


def cells(row: Mapping[str, Any]) -> dict[str, str]:
    """COLUMNS of a row; who has no figures has its status in place of its speed."""
    line = dict.fromkeys(COLUMNS, "")
    line |= {
        "model": row["model"], "size": _size(row["size_bytes"]), "backend": row["backend"],
        "params": _params(row["params"]), "provider": row["provider"],
        "test": row["test"], "batch": str(row["batch"]), "t/s": row["status"],
    }  # fmt: skip
    if "tokens_per_s" not in row:
        return line
    sd, memory, factor = row["tokens_per_s_sd"], row["peak_memory_bytes"], row.get("x_eager")
    line["t/s"] = f"{row['tokens_per_s']:.2f}" + ("" if sd is None else f" ± {sd:.2f}")
    if row["kind"] == PROMPT:
        line["first token"] = _ms(row["time_to_first_token_s"])
        line["of roof"] = f"{row['mfu']:.1%} MFU"
    else:
        line["p50 / p99 of a token"] = f"{_ms(row['token_p50_s'])} / {_ms(row['token_p99_s'])}"
        line["of roof"] = f"{row['mbu']:.1%} MBU"
    line["bytes a token"] = _size(row["bytes_per_token"])
    line["provider"] += " *" * (row["status"] == WITHOUT_GRAPHS)
    line["memory"] = "" if memory is None else _size(memory)
    line["× eager"] = "" if factor is None else f"{factor:.2f}"
    return line


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def _params(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e7 else f"{count / 1e6:.2f} M"
