"""Runs tests, benchmarks against transformers and a profile, within a time limit.

    make gpu                                            # 8 minutes; writes benchmarks/results/<gpu>
    make gpu GPU_MINUTES=4                              # each stage gets half as much time
    PYTHONPATH=. python3 -m benchmarks.gpu --out DIR    # does not need make

Stages run one after another, the most important first, each in its own process. A stage gets its
share of the remaining time, so a fast stage leaves more time to the later stages. If a stage fails
or runs out of time, its output is kept and the next stage runs. This project does not have to be
installed. Test files that import a missing package are left out. Without a GPU, the stages use tiny
shapes and nothing is measured.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import click

import gemma_fast
from gemma_fast.benchmarks import options as shared
from gemma_fast.benchmarks.kernels.rivals import RIVALS
from gemma_fast.benchmarks.kernels.table import SUITES
from gemma_fast.benchmarks.measure import report
from gemma_fast.benchmarks.measure.machine import device_and_dtype, stamp
from gemma_fast.benchmarks.measure.outcome import GENERATE_BATCH, OURS, UNPACKED

ROOT = Path(gemma_fast.__file__).parents[1]
GRACE = 5  # seconds that a stage gets to exit after SIGINT, before SIGKILL
COLUMNS = {"stage": "---", "status": "---", "seconds": "---:", "limit": "---:", "found": "---"}
BENCHMARKS = "-mgemma_fast.benchmarks"
# A size is run if its name contains one of these strings. They select about two sizes of most
# kernel suites. PROVIDERS lists only providers that compile fast.
SIZES = (
    "8192 x 2", "t 2048", "t 8192, 8/1", "t 8192, n 16", "t 1, 35", "m 512", "m 4096", "geglu, b",
    "b 1, depth 2048", "b 1, depth 8192, 8/1", "16384 x 2048", "256000 x 2048, b 1",
    "4224, b", "b 1, 8 of 128", "b 8, 64 of 128",
)  # fmt: skip
PROVIDERS = (
    "eager", "SDPA flash", "SDPA cuDNN", "torchao int4", "transformers batched_mm",
    "transformers grouped_mm", "gemma_fast",
)  # fmt: skip
MODELS = ("transformers (eager)", "transformers (sdpa)", "gemma_fast")
# 128 prompts of 4 to 512 tokens, 32 new tokens each; 8, 32 or 64 texts at the same time.
ARRIVAL = "--arrival 128 -b 8,32,64 -p 512 -n 32"
# Stages with packed weights: quantize → how many times as fast as bfloat16 a decode step should be.
TARGETS = {"int8": 1.8, "int4": 2.6}
# The stage runs these suites first, because it may run out of time.
IMPORTANT = (
    "norm_linear", "linear", "linear_int4", "linear_int8", "decode_attention", "lm_head",
    "experts", "experts_int4", "norm_router", "attention", "linear_packed_prompt",
    "experts_prompt",
)  # fmt: skip


class Stage(NamedTuple):
    name: str
    share: float  # weight of this stage when the time is divided between the stages
    arguments: Sequence[str]  # arguments of the Python interpreter
    missing: str = ""  # why the stage cannot run; empty if it can run


class Done(NamedTuple):
    """The outcome of a stage: one line of the summary's table (see COLUMNS)."""

    stage: str
    status: str
    seconds: float = 0.0
    limit_s: float = 0.0
    exit_code: int | None = None
    found: str = ""

    def cells(self) -> dict[str, str]:
        seconds = {"seconds": f"{self.seconds:.0f} s", "limit": f"{self.limit_s:.0f} s"}
        return self._asdict() | seconds


def stages(cuda: bool) -> list[Stage]:
    """Returns the stages for a GPU; or, for a CPU, those that run on it, with tiny shapes."""
    model = [BENCHMARKS, "model", *repeat("--only", MODELS), "-r", "3" if cuda else "1"]
    depths, prompts, new = ("512,4096", "2048,8192", "64") if cuda else ("5", "8", "2")
    gemma4 = [*model, "--model", "gemma-4-e2b", "-p", "2048", "-n", new, "-d", "0,4096"]
    packed = [BENCHMARKS, "model", *repeat("--only", (OURS, UNPACKED)), "-p", "0", "-n", new]
    packed += ["-d", "512" if cuda else "5", "-r", "3" if cuda else "1", "--quantize"]
    arrival = [BENCHMARKS, "model", *repeat("--only", (OURS, GENERATE_BATCH)), "-r", "2"]
    arrival += ARRIVAL.split() if cuda else ["--arrival", "4", "-b", "2", "-p", "8", "-n", "2"]
    kernels = [BENCHMARKS, *IMPORTANT, *(x for x in SUITES if x not in IMPORTANT)]
    kernels += repeat("--only", PROVIDERS)
    kernels += repeat("--size", SIZES) if cuda else []
    marked = [x for x in runnable("**/test_*.py") if "mark.gpu" in x.read_text("utf-8")]
    of_kernels = runnable("kernels/test_*.py" if cuda else "kernels/test_embed.py")
    return [
        tests("tests marked gpu", 60, marked, "gpu"),
        tests("tests of kernels", 60, of_kernels, "not gpu"),
        Stage("decode", 70, [*model, "-p", "0", "-n", new, "-d", depths]),
        *(Stage(f"decode {name}", 30, [*packed, name]) for name in TARGETS),
        Stage("prefill", 40, [*model, "-p", prompts, "-n", "0"]),
        Stage("arrival", 45, arrival),
        Stage("gemma 4", 60, gemma4, "" if cuda else "needs a GPU"),
        Stage("kernels", 55, kernels),
        Stage("profile", 30, [f"{BENCHMARKS}.profile"], "" if cuda else "needs a GPU"),
    ]


def repeat(option: str, values: Iterable[str]) -> list[str]:
    return [word for value in values for word in (option, value)]


def tests(name: str, share: float, files: Sequence[Path], marker: str) -> Stage:
    """Returns a stage that runs pytest, in up to 8 processes if xdist is installed."""
    arguments = ["-m", "pytest", "-q", "-m", marker, *map(str, files)]
    if find_spec("xdist"):
        arguments += ["-n", str(min(os.cpu_count() or 1, 8))]
    missing = "" if find_spec("pytest") else "pytest is not installed"
    return Stage(name, share, arguments, missing or ("" if files else "no test file to run"))


def runnable(pattern: str) -> list[Path]:
    """Returns the test files that match the pattern and import only installed packages.

    kernels/test_compile.py is left out, because it needs no GPU.
    """
    tests = ROOT / "tests"
    own = {"gemma_fast", *(path.stem for path in tests.rglob("*.py"))}
    found = []
    for path in sorted({*tests.glob(pattern)} - {tests / "kernels/test_compile.py"}):
        imports = re.findall(r"^(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.M)
        if all(find_spec(x) for x in {*imports} - own):
            found.append(path)
    return found


def run_stage(stage: Stage, limit: float, out: Path, commit: str | None) -> Done:
    """Runs a stage. Prints its output, and writes it to log.txt next to its results."""
    if stage.missing:
        return Done(stage.name, f"left out: {stage.missing}")
    folder = out / stage.name.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").unlink(missing_ok=True)  # it may be left from an earlier run
    command = [sys.executable, *stage.arguments]
    if stage.arguments[0].startswith(BENCHMARKS):
        command += ["--out", str(folder.resolve()), *(["--commit", commit] if commit else [])]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    start, over, last = time.perf_counter(), threading.Event(), ""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, errors="replace", start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip

    def end() -> None:
        over.set()
        stop(process)

    timer = threading.Timer(limit, end)
    timer.start()
    assert process.stdout is not None
    try:
        with process.stdout, (folder / "log.txt").open("w", encoding="utf-8") as log:
            for line in process.stdout:
                click.echo(line, nl=False)
                log.write(line)
                log.flush()
                last = last if over.is_set() else line.strip() or last
        code = process.wait()
    finally:
        timer.cancel()
        stop(process)
    status = "out of time" if over.is_set() else "ok" if code == 0 else "failed"
    seconds = time.perf_counter() - start
    return Done(stage.name, status, seconds, limit, code, summary(folder) or last)


def summary(folder: Path) -> str:
    """Counts the results in folder/results.json. Returns a text such as "12 results, 11 ok".

    Appends our speed with packed weights, relative to unpacked bfloat16, if both were measured.
    Returns an empty string if the file does not exist.
    """
    if not (file := folder / "results.json").exists():
        return ""
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    found = f"{len(results)} results, {sum(x['status'].startswith('ok') for x in results)} ok"
    rates = {x["provider"]: x["tokens_per_s"] for x in results if "tokens_per_s" in x}
    if UNPACKED in rates and OURS in rates:
        name = folder.name.removeprefix("decode-")
        found += f", {rates[OURS] / rates[UNPACKED]:.2f} × bfloat16"
        found += f" (target {TARGETS[name]})" if name in TARGETS else ""
    return found


def stop(process: subprocess.Popen[str]) -> None:
    """Stops a stage and the processes that it started: SIGINT first, then SIGKILL."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def write_summary(out: Path, head: Mapping[str, Any], measured: bool, done: list[Done]) -> str:
    """Writes summary.json and summary.md. Returns the text of summary.md."""
    found = {"stamp": head, "measured": measured, "stages": [x._asdict() for x in done]}
    (out / "summary.json").write_text(report.as_json(found), encoding="utf-8")
    parts = [report.heading(head, None), *([] if measured else [report.NOTHING])]
    parts.append(report.table(COLUMNS, [x.cells() for x in done]))
    text = "\n\n".join(parts) + "\n"
    (out / "summary.md").write_text(text, encoding="utf-8")
    return text


def run_stages(
    todo: Sequence[Stage], seconds: float, out: Path, head: Mapping[str, Any], measured: bool
) -> list[Done]:
    """Runs the stages within `seconds`. Writes the summary after each stage."""
    end, done = time.perf_counter() + seconds, list[Done]()
    for i, stage in enumerate(todo):
        left = max(end - time.perf_counter(), 0)
        limit = left * stage.share / sum(later.share for later in todo[i:])
        click.echo(f"\n== {stage.name}, at most {limit:.0f} s")
        done.append(run_stage(stage, limit, out, head["commit"]))
        write_summary(out, head, measured, done)
    return done


@click.command(help=__doc__.split("\n")[0])
@click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True), default=8, show_default=True,
    help="Time limit of all stages together.",
)  # fmt: skip
@shared.out_option("Write results here. [default: benchmarks/results/<gpu name>]")
@shared.commit_option
@click.pass_context
def main(context: click.Context, minutes: float, out: Path | None, commit: str | None) -> None:
    # SIGTERM raises SystemExit, so that run_stage stops the running stage.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    device, kind = device_and_dtype(None)
    head, cuda = stamp(device, [kind], ["transformers", *RIVALS], commit), device.type == "cuda"
    name = re.sub("[^a-z0-9]+", "-", (head["gpu"] or "no gpu").lower()).strip("-")
    out = out or ROOT / "benchmarks" / "results" / name
    shared.make_folder(out)
    done = run_stages(stages(cuda), 60 * minutes, out, head, cuda)
    click.echo("\n" + write_summary(out, head, cuda, done) + f"\nResults are in {out}.")
    context.exit(0 if all(x.status == "ok" or not x.limit_s for x in done) else 1)


if __name__ == "__main__":
    main()
