"""Measures launch configs (tile sizes, warps, stages) of each kernel, to find the fastest.

    python -m benchmarks.tune                                     # every suite
    python -m benchmarks.tune linear attention --size "b 1" --size "t 8192" --out DIR

The config that a kernel's launcher passes to `launch_config` is called the table's config. Each
size of a suite is run with the table's config, and with every combination of the suite's `tuning`.
Each config is checked and timed like a provider of the suite. The best of many times is partly
luck, so the fastest few configs and the table's config are timed again. The kernels are not
changed: write a better config into the kernel's file by hand, and note the run that found it.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import track
from triton.runtime.errors import OutOfResources

from gemma_fast.benchmarks import options as shared
from gemma_fast.benchmarks.kernels.suite import Call, Config, Prepare, Size, Suite, make_inputs, run
from gemma_fast.benchmarks.kernels.table import SUITES
from gemma_fast.benchmarks.measure import report
from gemma_fast.benchmarks.measure.machine import Roof, device_and_dtype, measure_roof, stamp
from gemma_fast.benchmarks.measure.outcome import OURS
from gemma_fast.kernels.launch import override

TABLE = f"{OURS}, as the table has it"  # check_replay checks only names that begin with OURS
# The fastest FINALISTS configs, and the table's own, are timed again ROUNDS times.
FINALISTS, ROUNDS = 4, 3


def variants(suite: Suite, size: Size) -> Suite:
    """Returns the suite with other providers. Each is our op: one with the table's config (TABLE),
    and one with each candidate config."""
    ours, tuning = suite.providers[OURS], suite.tuning
    assert tuning is not None

    def provider(config: Config) -> Prepare:
        def prepare(*inputs: Any) -> Call:
            call = ours(*inputs)

            def launch() -> Any:
                try:
                    with override(tuning.kernel, **config):
                        return call()
                except OutOfResources as problem:
                    raise NotImplementedError(str(problem)) from problem

            return launch

        return prepare

    tried = {name: provider(config) for name, config in tuning.candidates(size).items()}
    return replace(suite, yardstick=False, providers={TABLE: ours, **tried})


def compile_ahead(
    suite: str, keywords: Size, name: str, device: torch.device, dtype: torch.dtype
) -> None:
    """Compiles the kernel of one provider of `variants`, so that it is in Triton's cache. This
    function runs in a worker process."""
    prepare = variants(SUITES[suite], keywords).providers[name]
    prepare(*make_inputs(SUITES[suite], keywords, device, dtype, 0))()
    torch.cuda.empty_cache()  # leave memory to the other processes


def time_configs(
    suite: Suite, size: str, device: torch.device, dtype: torch.dtype, roof: Roof
) -> list[dict[str, Any]]:
    """Returns a dict per config: its name ("tile"), status and times. The fastest config is first.

    `again_us` is the median of the additional times, if the config was timed again.
    """
    results = list(run(suite, size, device, dtype, roof))
    measured = sorted((r for r in results if r.times), key=lambda r: r.figures(roof)["median_us"])
    names = dict.fromkeys([*(r.provider for r in measured[:FINALISTS]), TABLE])
    again: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(ROUNDS):
        for r in run(suite, size, device, dtype, roof, names):
            again[r.provider] += [r.figures(roof)["median_us"]] if r.times else []
    found = [
        {"tile": r.provider, "status": r.status, **r.figures(roof)}
        | ({"again_us": statistics.median(times)} if (times := again.get(r.provider)) else {})
        for r in results
    ]
    never = float("inf")
    return sorted(found, key=lambda x: (x.get("again_us", never), x.get("median_us", never)))


def result_lines(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields a line per config that was timed again, and a line with the number of failures."""
    for x in found:
        if "again_us" in x:
            share = x["share_of_roof"] * x["median_us"] / x["again_us"]
            yield f"  {x['again_us']:9.2f} µs  {share:.3f} of the roof  {x['tile']}"
    if failed := [x for x in found if "median_us" not in x]:
        yield f"  {len(failed)} of {len(found)} not measured, the first: {failed[0]['status']}"


def chosen(names: Sequence[str], sizes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields (suite, size) for the named suites, or for all suites if no names are given.

    Only sizes whose name contains one of `sizes` are used, or all sizes if `sizes` is empty.
    """
    shared.refuse_unknown("suite", names, SUITES)
    picked = [name for name in SUITES if not names or name in names]
    shared.refuse_unused_sizes([size for name in picked for size in SUITES[name].sizes], sizes)
    for name in picked:
        yield from ((name, size) for size in shared.pick_sizes(SUITES[name].sizes, sizes))


@click.command(help=__doc__.split("\n")[0])
@click.argument("names", nargs=-1, metavar="[SUITE]...")
@shared.size_option
@shared.dtype_option
@shared.out_option("Write tune.json here.")
@shared.commit_option
def main(
    names: Sequence[str], sizes: Sequence[str], dtype: str | None, out: Path | None,
    commit: str | None,
) -> None:  # fmt: skip
    todo = list(chosen(names, sizes))
    device, kind = device_and_dtype(dtype)
    if device.type != "cuda":
        raise click.ClickException("tuning needs a CUDA GPU, and there is none")
    shared.make_folder(out)
    roof, head = measure_roof(device, kind), stamp(device, [kind], [], commit)
    click.echo(report.heading(head, roof))
    results = []
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 16), get_context("spawn")) as pool:
        for name, size in todo:
            keywords = SUITES[name].sizes[size]
            suite = variants(SUITES[name], keywords)
            with suppress(BrokenProcessPool):  # then time_configs compiles the kernels
                ahead = [
                    pool.submit(compile_ahead, name, keywords, x, device, kind)
                    for x in suite.providers
                ]
                for future in track(ahead, f"{name}, {size}", console=Console(stderr=True)):
                    future.exception()  # waits; time_configs reports failures
            found = time_configs(suite, size, device, kind, roof)
            click.echo("\n".join([f"{name}, {size}", *result_lines(found)]))
            results += [{"suite": name, "size": size, **x} for x in found]
            if out:  # written after each size, so that an interrupted run keeps its results
                written = {"stamp": head, "roof": roof._asdict(), "results": results}
                (out / "tune.json").write_text(report.as_json(written), encoding="utf-8")


if __name__ == "__main__":
    main()
