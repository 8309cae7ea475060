"""Checks the accuracy on this machine and prints the results, which are called the certificate.

Kernels are compared with float64, the model with transformers' model in float32 (see truth.py).
Each line shows one finding (see margins.py): our figures, eager PyTorch's figures, the limits of
our figures, and a verdict. A limit is `factor` times eager PyTorch's figure plus `slack`; MARGINS
states the reasons. Factor and slack are constants; all other numbers are measured on this machine.
cost.py compares packed weights with unpacked ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from gemma_fast.benchmarks.measure.machine import stamp
from gemma_fast.benchmarks.measure.outcome import OURS
from gemma_fast.benchmarks.measure.report import heading
from gemma_fast.benchmarks.model.cases import find, is_packed
from gemma_fast.benchmarks.verify import margins
from gemma_fast.benchmarks.verify.cost import check_cost
from gemma_fast.benchmarks.verify.ids import check_ids
from gemma_fast.benchmarks.verify.kernels import check_kernels
from gemma_fast.benchmarks.verify.margins import MARGINS, MODEL, Finding
from gemma_fast.benchmarks.verify.model import check_model, dtypes_of, text_ids
from gemma_fast.benchmarks.verify.truth import truth_of
from gemma_fast.checkpoint.rounded import with_quantize
from gemma_fast.kernels.launch import runs_triton
from gemma_fast.load import pick_device

WIDTH = 120  # characters per line, if the output is not a terminal


def certify(
    model: str | None, device: str | None, dtype: str, tokens: int, as_json: bool,
    quantize: str | None = None,
) -> bool:  # fmt: skip
    """Prints the certificate, and the progress to stderr. Returns whether every line passed."""
    if runs_triton(torch.empty(0)):
        raise ValueError(
            "TRITON_INTERPRET is set, so the model would run in the interpreter: unset it"
        )
    target, plain = pick_device(device, None), find(model or "demo")
    checkpoint = with_quantize(plain, quantize, target)
    head = stamp(target, [torch.float32], ["transformers"])  # names the commit that is loaded
    dtypes = dtypes_of(checkpoint, target, dtype)
    ids = text_ids(plain, tokens).to(target)
    lines = list(kernel_lines(target))
    if is_packed(checkpoint):
        lines += check_cost(plain, checkpoint, target, dtypes)
    click.echo("the truth, float32", err=True)
    truth, exact = truth_of(checkpoint, target)
    lines += check_ids(checkpoint, truth, exact)
    lines += check_model(checkpoint, ids, dtypes, tokens, (truth, exact))
    head["dtype"] = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    head |= {
        "model": (model or "demo") + (f", {quantize}" if quantize else ""),
        "beside": truth.name,
        "truth": f"{truth.name}, {truth.reader}",
        "reader_checked": truth.ids is not None,
        "kernels": how_checked(target),
    }
    passed = all(line.ok for line in lines)
    if as_json:
        click.echo(as_text(head, lines, passed))
    else:
        show(head, lines, passed)
    return passed


def how_checked(device: torch.device) -> str:
    if device.type == "cuda":
        return "The kernels were checked on this GPU."
    runs_here = "this device runs the CPU path, which was checked too."
    if find_spec("triton") is None:
        return f"Triton is not installed: no kernel was checked; {runs_here}"
    where = "in Triton's interpreter only, in float32 and float16"
    return f"The kernels were checked {where}; {runs_here}"


def kernel_lines(device: torch.device) -> Iterator[Finding]:
    if device.type == "cuda":
        click.echo("kernels, on the GPU", err=True)
        yield from check_kernels(
            device, [torch.float32, torch.bfloat16, torch.float16], margins.ON_GPU
        )
        return
    if find_spec("triton"):
        click.echo("kernels, in Triton's interpreter", err=True)
        yield from interpreted()
    click.echo("kernels' references, on the CPU", err=True)
    yield from check_kernels(device, [torch.float32, torch.bfloat16], margins.CPU_PATH)


def interpreted() -> list[Finding]:
    """Checks the kernels in Triton's interpreter, in a separate process, because TRITON_INTERPRET
    is read when a kernel is imported."""
    command = [sys.executable, "-m", "gemma_fast.benchmarks.verify.kernels"]
    root = Path(__file__).parents[3]  # the folder that contains the package, installed or not
    # The interpreter also computes masked elements, and warns if they overflow.
    quiet = "ignore::RuntimeWarning:triton.runtime.interpreter"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": quiet}
    done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        problem = f"the interpreter's process ended with status {done.returncode}"
        return [Finding(margins.INTERPRETER, "all", "", (), problem)]
    return [Finding.of_dict(line) for line in json.loads(done.stdout)]


def as_text(head: Mapping[str, Any], lines: Iterable[Finding], passed: bool) -> str:
    """Returns the certificate as JSON, in which figures that are not finite are null."""
    limits = {name: margin._asdict() for name, margin in MARGINS.items()}
    found = {"stamp": head, "margins": limits, "lines": [x.as_dict() for x in lines]}
    text = json.dumps(found | {"passed": passed})
    return json.dumps(json.loads(text, parse_constant=lambda _: None), ensure_ascii=False)


def show(head: Mapping[str, Any], lines: Iterable[Finding], passed: bool) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    console.print(f"{heading(head, None)} {head['kernels']}", highlight=False)
    for part, group in groupby(lines, lambda line: line.part):
        other = {MODEL: head["beside"], margins.COST: "unpacked"}.get(part, "eager")
        title = f"{head['model']} against {head['truth']}, in float32" if part == MODEL else part
        table = Table("", "dtype", OURS, other, "allowed", "", title=title)
        for line in group:
            columns = zip(*(figure[1:] for figure in line.figures), strict=True)
            cells = [" / ".join(map(number, column)) for column in columns] or [line.note, "", ""]
            verdict = "[green]pass[/]" if line.ok else "[bold red]FAIL[/]"
            table.add_row(line.check, line.dtype, *cells, verdict)
        console.print(table)
    allowed = Table("allowed", "float32", "16 bits", "why", title="Margins")
    for name, margin in MARGINS.items():
        allowed.add_row(name, *(f"{x:g} × eager {y:+g}" for x, y in margin[:2]), margin.why)
    console.print(allowed)
    reader = (
        "" if head["reader_checked"] else " gemma_fast's reader of checkpoints was not checked."
    )
    console.print(("Every line passed." if passed else "A line FAILED.") + reader, highlight=False)


def number(x: float | None) -> str:
    return "–" if x is None else f"{x:.3g}"
