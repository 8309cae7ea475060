"""A certificate of fidelity for this machine: the kernels against float64, the model against its
reference in float32, each beside eager PyTorch, with a verdict a line.

A figure may be as large as `factor` times eager's, and `slack` more; MARGINS says why. Nothing is
compared with figures from elsewhere, but for the slack.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from rich.console import Console
from rich.table import Table

import gemma_fast
from gemma_fast.benchmarks.kernels.suite import OURS
from gemma_fast.benchmarks.measure.machine import stamp
from gemma_fast.benchmarks.measure.report import heading
from gemma_fast.benchmarks.model.cases import find
from gemma_fast.kernels.launch import runs_triton
from gemma_fast.load import pick_device

ERRORS = "error, max / RMS in ulp"
ON_GPU, INTERPRETER = f"Kernels on the GPU: {ERRORS}", f"Kernels in Triton's interpreter: {ERRORS}"
CPU_PATH, MODEL = f"The CPU path, the kernels' references: {ERRORS}", "model"
WIDTH = 120  # of what is not a terminal


class Margin(NamedTuple):
    """(factor, slack) in float32 and in 16 bits, and why so."""

    float32: tuple[float, float]
    half: tuple[float, float]
    why: str


MAX_ULP, RMS_ULP, CHOICE_ULP = "max ulp", "RMS ulp", "ulp under the best"
KL_MEAN, KL_MAX = "KL mean", "KL max"
DELTA_MEAN, DELTA_MAX = "|Δ| mean", "|Δ| max"
TOP_1, PERPLEXITY = "top-1 agreement", "perplexity change"
ALIKE, GAP = "greedy tokens until they part", "largest gap"
BATCH_DELTA, BATCH_ALIKE = "|Δ| max, batch 8", "greedy texts alike"
BATCH_GAP = "largest gap, batch 8"
LOGITS_VARY, TOKENS_VARY = "logits that vary", "tokens that vary"
NOISE = "in float32 sums in another order, and exp and rsqrt of a GPU"
MARGINS = {
    RMS_ULP: Margin((2, 2), (1.1, 0.05), f"{NOISE}; in 16 bits no step more is rounded"),
    MAX_ULP: Margin((3, 16), (1.5, 1), "the largest of many errors scatters"),
    CHOICE_ULP: Margin((2, 16), (1.5, 2), "of a chosen token's logit; near-ties fall either way"),
    KL_MEAN: Margin((2, 1e-8), (1.25, 1e-5), "two roundings of one model differ by as much"),
    KL_MAX: Margin((3, 1e-6), (2, 1e-3), "the largest of many scatters"),
    DELTA_MEAN: Margin((2, 1e-4), (1.1, 1e-3), "of logits; two roundings differ by as much"),
    DELTA_MAX: Margin((3, 1e-3), (1.5, 0.05), "the largest of many scatters"),
    TOP_1: Margin((1, -0.002), (1, -0.02), "at least; near-ties fall either way"),
    PERPLEXITY: Margin((2, 1e-5), (1.5, 0.005), "of the text, relative to the reference's"),
    GAP: Margin((0, 1e-3), (2, 0.25), "a token chosen may lie so far under the reference's best"),
    BATCH_DELTA: Margin((3, 1e-3), (1.5, 0.05), "batch 8 takes other sums than batch 1"),
    BATCH_GAP: Margin((0, 1e-3), (2, 0.25), "a token chosen in a batch, under what is best alone"),
    LOGITS_VARY: Margin((0, 0), (0, 0), "same input, same bits"),
    TOKENS_VARY: Margin((0, 0), (0, 0), "same input, same tokens"),
}  # fmt: skip
AT_LEAST = {TOP_1}


class Figure(NamedTuple):
    name: str
    ours: float
    eager: float | None  # None: not measured
    limit: float | None  # None: shown, not judged

    @property
    def ok(self) -> bool:
        if self.limit is None:
            return True
        ours = abs(self.ours)
        return ours >= self.limit if self.name in AT_LEAST else ours <= self.limit


@dataclass(frozen=True)
class Line:
    part: str
    check: str
    dtype: str
    figures: tuple[Figure, ...]
    note: str = ""  # what a check raised

    @property
    def ok(self) -> bool:
        return not self.note and all(figure.ok for figure in self.figures)

    def as_dict(self) -> dict[str, Any]:
        figures = [figure._asdict() for figure in self.figures]
        return asdict(self) | {"figures": figures, "verdict": "pass" if self.ok else "FAIL"}

    @classmethod
    def of_dict(cls, given: dict[str, Any]) -> Line:
        figures = tuple(Figure(**figure) for figure in given["figures"])
        return cls(given["part"], given["check"], given["dtype"], figures, given["note"])


def line(
    part: str, check: str, dtype: torch.dtype,
    pairs: Mapping[str, tuple[float, float | None]], note: str = "",
) -> Line:  # fmt: skip
    """pairs: a figure's name → ours, eager's; MARGINS gives the limit."""
    figures = []
    for name, (ours, eager) in pairs.items():
        limit = None
        if name in MARGINS:
            margin = MARGINS[name]
            factor, slack = margin.float32 if dtype == torch.float32 else margin.half
            limit = factor * abs(eager or 0) + slack
        figures.append(Figure(name, ours, eager, limit))
    return Line(part, check, str(dtype).removeprefix("torch."), tuple(figures), note)


def certify(model: str | None, device: str | None, dtype: str, tokens: int, as_json: bool) -> bool:
    """Prints the certificate, progress to stderr; whether every line passed."""
    from gemma_fast.benchmarks.verify.model import check_model, dtypes_of, rival, text_ids

    if runs_triton(torch.empty(0)):
        raise ValueError(
            "TRITON_INTERPRET is set, so the model would run in the interpreter: unset it"
        )
    target, other, checkpoint = pick_device(device, None), rival(), find(model or "demo")
    dtypes = dtypes_of(checkpoint, target, dtype)
    ids = text_ids(checkpoint, tokens).to(target)
    lines = list(kernel_lines(target))
    lines += check_model(checkpoint, ids, dtypes, tokens, other)
    head = stamp(target, torch.float32, ["transformers"])
    head["dtype"] = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    head |= {"model": model or "demo", "beside": other.name, "kernels": how_checked(target)}
    passed = all(line.ok for line in lines)
    if as_json:
        click.echo(as_text(head, lines, passed))
    else:
        show(head, lines, passed)
    return passed


def how_checked(device: torch.device) -> str:
    if device.type == "cuda":
        return "The kernels were checked on this GPU."
    runs_here = "what runs on this device is the CPU path, checked too."
    if find_spec("triton") is None:
        return f"Triton is not installed: no kernel was checked; {runs_here}"
    where = "in Triton's interpreter only, in float32 and float16"
    return f"The kernels were checked {where}; {runs_here}"


def kernel_lines(device: torch.device) -> Iterator[Line]:
    from gemma_fast.benchmarks.verify.kernels import check_kernels

    if device.type == "cuda":
        click.echo("kernels, on the GPU", err=True)
        yield from check_kernels(device, [torch.float32, torch.bfloat16, torch.float16], ON_GPU)
        return
    if find_spec("triton"):
        click.echo("kernels, in Triton's interpreter", err=True)
        yield from interpreted()
    click.echo("their references on the CPU", err=True)
    yield from check_kernels(device, [torch.float32, torch.bfloat16], CPU_PATH)


def interpreted() -> list[Line]:
    """In a process of its own: what a kernel runs in is settled when it is imported."""
    command = [sys.executable, "-m", "gemma_fast.benchmarks.verify.kernels"]
    root = Path(gemma_fast.__file__).parents[1]  # where the package lies, installed or not
    # It computes what masks leave out, and warns that this overflows.
    quiet = "ignore::RuntimeWarning:triton.runtime.interpreter"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": quiet}
    done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        problem = f"the interpreter's process ended with status {done.returncode}"
        return [Line(INTERPRETER, "all", "", (), problem)]
    return [Line.of_dict(line) for line in json.loads(done.stdout)]


def as_text(head: Mapping[str, Any], lines: Iterable[Line], passed: bool) -> str:
    """JSON, in which a figure that is not finite is null."""
    margins = {name: margin._asdict() for name, margin in MARGINS.items()}
    found = {"stamp": head, "margins": margins, "lines": [x.as_dict() for x in lines]}
    text = json.dumps(found | {"passed": passed})
    return json.dumps(json.loads(text, parse_constant=lambda _: None), ensure_ascii=False)


def show(head: Mapping[str, Any], lines: Iterable[Line], passed: bool) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    console.print(f"{heading(head, None)} {head['kernels']}", highlight=False)
    for part, group in groupby(lines, lambda line: line.part):
        other = head["beside"] if part == MODEL else "eager"
        title = f"{head['model']} before the reference in float32" if part == MODEL else part
        table = Table("", "dtype", OURS, other, "allowed", "", title=title)
        for line in group:
            columns = zip(*(figure[1:] for figure in line.figures), strict=True)
            cells = [" / ".join(map(number, column)) for column in columns] or [line.note, "", ""]
            table.add_row(line.check, line.dtype, *cells, word(line.ok))
        console.print(table)
    margins = Table("allowed", "float32", "16 bits", "why", title="Margins")
    for name, margin in MARGINS.items():
        margins.add_row(name, *(f"{x:g} × eager {y:+g}" for x, y in margin[:2]), margin.why)
    console.print(margins)
    console.print("Every line passed." if passed else "A line FAILED.", highlight=False)


def number(x: float | None) -> str:
    return "–" if x is None else f"{x:.3g}"


def word(ok: bool) -> str:
    return "[green]pass[/]" if ok else "[bold red]FAIL[/]"
