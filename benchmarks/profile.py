"""Profiles a decode step or a prefill, and prints each kernel's share of the time.

    python -m benchmarks.profile                   # a decode step of Gemma 2B after 512 tokens
    python -m benchmarks.profile -p 8192           # prefill of 8192 tokens
    python -m benchmarks.profile -d 1024 -b 64 --model gemma-3-270m --out DIR

One decode step or one prefill is called a round. The printed times are means over several rounds.
They are measured by PyTorch's profiler, which slows kernels down a little, so the wall-clock time
without the profiler is printed next to the sum of the times. Kernels may overlap (programmatic
dependent launch). Overlapping time is counted only for the earlier kernel: a kernel's time starts
when all earlier kernels have ended.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

from gemma_fast.benchmarks import options as shared
from gemma_fast.benchmarks.measure import report
from gemma_fast.benchmarks.measure.machine import device_and_dtype, stamp
from gemma_fast.benchmarks.measure.outcome import OURS
from gemma_fast.benchmarks.measure.timing import wall_seconds
from gemma_fast.benchmarks.model.cases import NEW, PROMPT, find
from gemma_fast.benchmarks.model.providers import PROVIDERS
from gemma_fast.checkpoint.rounded import with_quantize

ROUNDS = 20
WARM = 5  # warm-ups of ROUNDS rounds each, to compile, capture graphs and settle the clock rates
COLUMNS = dict.fromkeys(
    ("kernel", "grid", "launches", "µs a launch", "µs", "share", "idle before"), "---"
)


class Kernel(NamedTuple):
    name: str
    grid: str
    start: float  # µs
    end: float


class Share(NamedTuple):
    """All launches of one kernel with the same grid. The numbers are means per round."""

    name: str
    grid: str
    launches: float
    busy: float  # µs in which the kernel runs and all earlier kernels have ended
    idle: float  # µs in which the GPU is idle before the kernel


def kernels(trace: Mapping[str, Any]) -> list[Kernel]:
    """Returns the kernels, copies and memsets in a trace of PyTorch's profiler, by start time."""
    found = []
    for event in trace["traceEvents"]:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            grid = "x".join(map(str, event["args"].get("grid", ())))
            found.append(Kernel(event["name"], grid, event["ts"], event["ts"] + event["dur"]))
    return sorted(found, key=lambda kernel: kernel.start)


def shares(ran: Iterable[Kernel]) -> list[Share]:
    """Returns a Share per kernel and grid, the one with the largest busy + idle time first.

    The idle time before the first kernel is not counted.
    """
    total: dict[tuple[str, str], list[float]] = {}
    done = None
    for kernel in ran:
        done = kernel.start if done is None else done
        launches_busy_idle = total.setdefault((kernel.name, kernel.grid), [0, 0, 0])
        launches_busy_idle[0] += 1
        launches_busy_idle[1] += max(kernel.end - max(kernel.start, done), 0)
        launches_busy_idle[2] += max(kernel.start - done, 0)
        done = max(done, kernel.end)
    found = [Share(*key, *(x / ROUNDS for x in of_all)) for key, of_all in total.items()]
    return sorted(found, key=lambda share: -share.busy - share.idle)


def kernel_table(found: Sequence[Share], clock: float) -> str:
    """Returns a Markdown table. clock: wall-clock µs of a round without the profiler."""
    busy, idle = sum(x.busy for x in found), sum(x.idle for x in found)
    lines = [
        {
            "kernel": x.name[:60], "grid": x.grid, "launches": f"{x.launches:g}",
            "µs a launch": f"{x.busy / x.launches:.2f}", "µs": f"{x.busy:.1f}",
            "share": f"{x.busy / (busy + idle):.1%}", "idle before": f"{x.idle:.1f}",
        }
        for x in found
    ]  # fmt: skip
    total = f"Sum {busy + idle:.1f} µs, of which idle {idle:.1f}"
    clocked = f"wall clock without the profiler: {clock:.1f} µs."
    return f"{report.table(COLUMNS, lines)}\n\n{total}; {clocked}\n"


def rounds(work: Callable[[], Any]) -> None:
    for _ in range(ROUNDS):
        work()


def traced(work: Callable[[], Any]) -> dict[str, Any]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        rounds(work)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(file))
        return json.loads(file.read_text(encoding="utf-8"))


@torch.no_grad()
def prepare(
    model: str, prompt: int, depth: int, batch: int, device: torch.device, dtype: torch.dtype,
    quantize: str | None = None,
) -> tuple[Callable[[], Any], Callable[[], Any]]:  # fmt: skip
    """Returns two functions: one that fills the cache before several rounds, and one that runs a
    round. A round is a prefill of `prompt` tokens or, if prompt is 0, one decode step after `depth`
    tokens. Raises ValueError if the tokens do not fit the context."""
    checkpoint = with_quantize(find(model), quantize, device)
    before, context = prompt or depth, checkpoint.config.max_position_embeddings
    room = before if prompt else depth + ROUNDS
    if room > context:
        raise ValueError(f"{room} tokens do not fit the context of {model}, {context}")
    ids = torch.randint(3, checkpoint.config.vocab_size, (batch, before)).to(device)
    provider = PROVIDERS[OURS](checkpoint, dtype, device)
    provider.start(batch, room, PROMPT if prompt else NEW)
    read = partial(provider.prefill, ids)
    return read, read if prompt else provider.step


@click.command(help=__doc__.split("\n")[0])
@click.option(
    "-p", "prompt", type=click.IntRange(0), default=0,
    help="Prompt tokens to prefill; 0: profile a decode step.",
)  # fmt: skip
@click.option(
    "-d", "depth", type=click.IntRange(1), default=512, show_default=True,
    help="Number of tokens in the cache before the decode step.",
)  # fmt: skip
@click.option(
    "-b", "batch", type=click.IntRange(1), default=1, show_default=True, help="Batch size."
)
@click.option("--model", default="gemma-2b", show_default=True, help="As in gemma-fast bench.")
@shared.dtype_option
@shared.quantize_option
@shared.out_option("Write profile.md here.")
@shared.commit_option
@click.pass_context
def main(
    context: click.Context, prompt: int, depth: int, batch: int, model: str, dtype: str | None,
    quantize: str | None, out: Path | None, commit: str | None,
) -> None:  # fmt: skip
    if prompt:
        shared.refuse_options(context, ["depth"], "is for a decode step, not for a prefill (-p)")
    device, kind = device_and_dtype(dtype)
    if device.type != "cuda":
        raise click.ClickException("profiling needs a CUDA GPU, and there is none")
    shared.make_folder(out)
    try:
        begin, work = prepare(model, prompt, depth, batch, device, kind, quantize)
    except (ValueError, OSError, ImportError) as error:
        raise click.ClickException(str(error)) from error
    for _ in range(WARM):
        begin()
        rounds(work)
    begin()
    clock = wall_seconds(lambda: rounds(work)) / ROUNDS
    begin()
    torch.cuda.synchronize()
    if not (ran := kernels(traced(work))):
        raise click.ClickException("PyTorch's profiler recorded no kernels")
    found = kernel_table(shares(ran), clock * 1e6)
    what = f"Prefill of {prompt}" if prompt else f"A step after {depth} to {depth + ROUNDS - 1}"
    head = report.heading(stamp(device, [kind], [], commit), None)
    which = f"{model}, {quantize}" if quantize else model
    text = f"{what} tokens, batch {batch}, {which}. {head}\n\n{found}"
    click.echo(text)
    if out:
        (out / "profile.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
