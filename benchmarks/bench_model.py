"""How fast a whole model reads a prompt (pp) and writes tokens (tg), named as llama-bench does.

    pp512          a prompt of 512 tokens, up to the choice of a token
    tg128          128 tokens, one after another
    tg128 @ d4096  the same, after 4096 tokens that the cache holds already; see model_cases.py

Each repeat is timed as a whole, by a clock that waits for the device before and after; tokens are
not read back between. How long single tokens took comes from one more pass: an event recorded on
the device after each step (on a CPU the clock), so that who launches ahead is not made to wait.

First each provider is checked. In float32 every token that it chooses must be the reference's; in
16 bits the reference, in float32 over the same weights, must find them nearly as good as its own,
and this project must be no further from it than transformers. A wrong provider is not timed.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from gemma_fast.benchmarks.harness import NOT_MEASURED, Wrong, verdict
from gemma_fast.benchmarks.machine import Roof, Work
from gemma_fast.benchmarks.model_cases import NEW, PROMPT, Case
from gemma_fast.benchmarks.model_check import Judge
from gemma_fast.benchmarks.model_providers import PROVIDERS, Provider
from gemma_fast.benchmarks.timing import clock
from gemma_fast.checkpoint import Checkpoint


@dataclass(frozen=True)
class Result:
    """seconds: of each repeat; token_seconds: of each step of one more pass."""

    case: Case
    provider: str
    status: str
    work: Work
    error: float | None = None  # see model_check.Judge
    seconds: tuple[float, ...] = ()
    token_seconds: tuple[float, ...] = ()
    peak_bytes: int | None = None  # on a GPU: with the weights, without the judge
    memory: dict[str, float] = field(default_factory=dict)

    def figures(self, roof: Roof | None) -> dict[str, Any]:
        """Of a measured result; a batch counts all its tokens."""
        if not self.seconds or roof is None:
            return {}
        case, mean = self.case, statistics.fmean(self.seconds)
        rates = [case.batch * case.tokens / seconds for seconds in self.seconds]
        figures = {
            "tokens_per_s": statistics.fmean(rates),
            "tokens_per_s_sd": statistics.stdev(rates) if len(rates) > 1 else None,
        }
        if case.kind == PROMPT:
            return figures | {
                "time_to_first_token_s": mean,
                "bytes": self.work.bytes, "flops": self.work.flops,
                "mfu": self.work.flops / mean / roof.product,
            }  # fmt: skip
        return figures | {
            "token_p50_s": statistics.median(self.token_seconds),
            "token_p99_s": percentile(self.token_seconds, 99),
            "bytes_per_step": self.work.bytes / case.tokens,
            "mbu": self.work.bytes / mean / roof.copy,
        }


def percentile(values: Sequence[float], percent: int) -> float:
    doubled = [*values, *values[:1]] if len(values) == 1 else values
    return statistics.quantiles(doubled, n=100, method="inclusive")[percent - 1]


@torch.no_grad()
def run(
    checkpoint: Checkpoint, cases: Sequence[Case], device: torch.device, dtype: torch.dtype,
    roof: Roof | None, repeats: int, names: Sequence[str],
    judge: Judge,
) -> Iterator[Result]:  # fmt: skip
    """Results provider by provider, in the order of PROVIDERS, which races this project last;
    without a roof checked, and not timed."""
    for name in (name for name in PROVIDERS if name in names):
        clear()
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        results = [
            Result(case, name, "ok", case.work(checkpoint.config, dtype.itemsize)) for case in cases
        ]
        try:
            provider = PROVIDERS[name](checkpoint, dtype, device)
        except Exception as problem:  # a rival may fail in any way: it is listed, the rest runs
            status = verdict(problem)
            yield from (replace(result, status=status) for result in results)
            continue
        for _, group in groupby(results, lambda r: (r.case.batch, r.case.depth)):
            yield from session(provider, list(group), device, before, roof, repeats, judge)
        del provider


def session(
    provider: Provider, results: list[Result], device: torch.device, before: int,
    roof: Roof | None, repeats: int, judge: Judge,
) -> Iterator[Result]:  # fmt: skip
    """The results of one batch and depth, which share a cache."""
    case = results[0].case
    clear()
    try:
        provider.start(case.batch, max(judge.room, *(r.case.room for r in results)))
        found = judge.check(results[0].provider, provider, case.batch, case.depth)
    except Exception as problem:
        status = verdict(problem)
        yield from (replace(result, status=status) for result in results)
        return
    for result in results:
        result = replace(result, error=found)
        if roof is None:
            yield replace(result, status=NOT_MEASURED)
            continue
        try:
            yield measure(provider, result, device, judge.vocab_size, before, repeats, roof)
        except Exception as problem:
            yield replace(result, status=verdict(problem))


def measure(
    provider: Provider, result: Result, device: torch.device, vocab_size: int, before: int,
    repeats: int, roof: Roof,
) -> Result:  # fmt: skip
    case, cuda = result.case, device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocab_size, (case.batch, case.room), generator=generator).to(device)
    work = read if case.kind == PROMPT else write
    for _ in range(2 if cuda else 1):  # compilers, graphs, clocks
        fill(provider, case, ids)
        work(provider, case, ids)
    seconds = []
    for _ in range(repeats):
        fill(provider, case, ids)
        start = clock()
        work(provider, case, ids)
        seconds.append(clock() - start)
    token_seconds: list[float] = []
    if case.kind == NEW:
        fill(provider, case, ids)
        token_seconds = step_seconds(provider.step, case.tokens, cuda)
    peak = torch.cuda.max_memory_allocated() - before if cuda else None
    times = (floor := roof.floor(result.work)) / statistics.fmean(seconds)
    if cuda and times > 1.25:  # a graph that captured nothing, a clock that did not wait
        raise Wrong(f"{times:.2g} times as fast as the roof, {floor:.2g} s")
    return replace(
        result, seconds=tuple(seconds), token_seconds=tuple(token_seconds), peak_bytes=peak,
        memory=provider.memory(),
    )  # fmt: skip


def fill(provider: Provider, case: Case, ids: Tensor) -> None:
    """What the cache holds before the clock starts."""
    if case.before:
        provider.prefill(ids[:, : case.before])


def read(provider: Provider, case: Case, ids: Tensor) -> None:
    (provider.extend if case.before else provider.prefill)(ids[:, case.before :])


def write(provider: Provider, case: Case, ids: Tensor) -> None:
    for _ in range(case.tokens):
        provider.step()


def step_seconds(step: Callable[[], Tensor], steps: int, cuda: bool) -> list[float]:
    """How long after the one before each step was done, on the device."""
    if not cuda:
        marks = [time.perf_counter()]
        for _ in range(steps):
            step()
            marks.append(time.perf_counter())
        return [end - start for start, end in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]


def clear() -> None:
    """What one provider needed is not another's lack: memory, and Dynamo's few tries."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
