"""How fast a whole model reads a prompt (pp) and writes tokens (tg), named as llama-bench does.

    pp512          a prompt of 512 tokens, up to the choice of a token
    tg128          128 tokens, one after another
    tg128 @ d4096  the same, after 4096 tokens that the cache holds already; see cases.py

Each repeat is timed as a whole, by a clock that waits for the device before and after, once the
device's own clocks have settled; tokens are not read back between. How long single tokens took
comes from one more pass: an event recorded on the device after each step (on a CPU the clock), so
that who launches ahead is not made to wait.

First each provider is checked, with as much in its cache as the test has. In float32 every token
that it chooses must be the reference's; in 16 bits the reference, in float32 over the same weights,
must find them nearly as good as its own, and this project must be no further from it than
transformers. A wrong provider is not timed.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gemma_fast.benchmarks.measure.machine import Roof, Work
from gemma_fast.benchmarks.measure.outcome import NOT_MEASURED, WITHOUT_GRAPHS, Wrong, verdict
from gemma_fast.benchmarks.measure.timing import clock, repeated, settle_rounds, wall_seconds
from gemma_fast.benchmarks.model.cases import NEW, PROMPT, Case
from gemma_fast.benchmarks.model.judge import Judge
from gemma_fast.benchmarks.model.providers import PROVIDERS, Provider
from gemma_fast.checkpoint.base import Checkpoint


@dataclass(frozen=True)
class ModelResult:
    """seconds: of each repeat; token_seconds: of each step of one more pass."""

    case: Case
    provider: str
    status: str
    work: Work
    error: float | None = None  # see judge.Judge
    seconds: tuple[float, ...] = ()
    token_seconds: tuple[float, ...] = ()
    peak_bytes: int | None = None  # reserved on a GPU: with weights and graphs, without the judge
    memory: dict[str, float] = field(default_factory=dict)
    took: float = 0.0  # seconds, of everything; of a provider's first result with its weights

    @property
    def cell(self) -> Case:
        """Providers are compared within it."""
        return self.case

    @property
    def typical(self) -> float | None:
        return statistics.fmean(self.seconds) if self.seconds else None

    def figures(self, roof: Roof | None) -> dict[str, Any]:
        """Figures of a measured result, raw samples last. A batch counts all its tokens."""
        if roof is None or (mean := self.typical) is None:
            return {}
        tokens = self.case.batch * self.case.tokens
        rates = [tokens / seconds for seconds in self.seconds]
        if self.case.kind == PROMPT:
            mfu = self.work.flops / mean / roof.product
            of_kind = {"time_to_first_token_s": mean, "mfu": mfu}
        else:
            of_kind = {
                "token_p50_s": statistics.median(self.token_seconds),
                "token_p99_s": percentile(self.token_seconds, 99),
                "mbu": self.work.bytes / mean / roof.copy,
            }
        return {
            "tokens_per_s": tokens / mean,
            "tokens_per_s_sd": statistics.stdev(rates) if len(rates) > 1 else None,
            "bytes": self.work.bytes, "flops": self.work.flops,
            "bytes_per_token": self.work.bytes / tokens, **of_kind,
            "samples_s": self.seconds, "token_samples_s": self.token_seconds,
            "peak_memory_bytes": self.peak_bytes, "memory": self.memory,
        }  # fmt: skip


def percentile(values: Sequence[float], percent: int) -> float:
    doubled = [*values, *values[:1]] if len(values) == 1 else values
    return statistics.quantiles(doubled, n=100, method="inclusive")[percent - 1]


@torch.no_grad()
def run(
    checkpoint: Checkpoint, cases: Sequence[Case], device: torch.device, dtype: torch.dtype,
    roof: Roof | None, repeats: int, names: Sequence[str], judge: Judge,
) -> Iterator[ModelResult]:  # fmt: skip
    """Results provider by provider, in the order of PROVIDERS: transformers as it is, which the
    judge compares this project with, is ahead; without a roof checked, and not timed."""
    config = checkpoint.config
    for name in (name for name in PROVIDERS if name in names):
        results = [
            ModelResult(case, name, case.status(config), case.work(config, dtype.itemsize))
            for case in cases
        ]
        try:
            clear()
            before = torch.cuda.memory_reserved() if device.type == "cuda" else 0
            provider = PROVIDERS[name](checkpoint, dtype, device)
        except Exception as problem:  # a rival may fail in any way: it is listed, the rest runs
            status = verdict(problem)
            yield from (replace(result, status=status) for result in results)
            continue
        for result in results:
            fits = result.status == "ok"
            yield race(provider, result, device, before, roof, repeats, judge) if fits else result
        del provider


def race(
    provider: Provider, result: ModelResult, device: torch.device, before: int, roof: Roof | None,
    repeats: int, judge: Judge,
) -> ModelResult:  # fmt: skip
    """One test, checked and timed. before: bytes reserved without the provider."""
    case = result.case
    try:
        clear()
        skipped = skipped_graphs()
        provider.start(case.batch, max(judge.room(case), case.room), case.kind)
        result = replace(result, error=judge.check(result.provider, provider, case))
        if roof is None:
            return replace(result, status=NOT_MEASURED)
        result = timed(provider, result, device, judge.vocab_size, before, repeats, roof)
        skips = skipped_graphs() > skipped
        return replace(result, status=WITHOUT_GRAPHS) if skips else result
    except Exception as problem:
        return replace(result, status=verdict(problem))


def timed(
    provider: Provider, result: ModelResult, device: torch.device, vocab_size: int, before: int,
    repeats: int, roof: Roof,
) -> ModelResult:  # fmt: skip
    case, cuda = result.case, device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()  # of the judge
        torch.cuda.reset_peak_memory_stats()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocab_size, (case.batch, case.room), generator=generator).to(device)
    before_clock, rest = ids[:, : case.before], ids[:, case.before :]
    read = provider.extend if case.before else provider.prefill

    def once() -> float:
        if case.before:
            provider.prefill(before_clock)
        start = clock()
        if case.kind == PROMPT:
            read(rest)
        else:
            for _ in range(case.tokens):
                provider.step()
        return clock() - start

    if cuda:
        settle_rounds(once)
    else:
        once()
    seconds = repeated(once, repeats)
    token_seconds: list[float] = []
    if case.kind == NEW:
        provider.prefill(before_clock)
        token_seconds = step_seconds(provider.step, case.tokens, cuda)
    peak = torch.cuda.max_memory_reserved() - before if cuda else None
    times = (floor := roof.floor(result.work)) / statistics.fmean(seconds)
    if cuda and times > 1.25:  # a graph that captured nothing, a clock that did not wait
        raise Wrong(f"{times:.2g} times as fast as the roof, {floor:.2g} s")
    return replace(
        result, seconds=tuple(seconds), token_seconds=tuple(token_seconds), peak_bytes=peak,
        memory=provider.memory(),
    )  # fmt: skip


def step_seconds(step: Callable[[], Tensor], steps: int, cuda: bool) -> list[float]:
    """Seconds of each step, on the device: from the end of the step before to its own."""
    if not cuda:
        return [wall_seconds(step) for _ in range(steps)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]


def clear() -> None:
    """Frees memory and resets Dynamo, so that no provider takes them from the next."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def skipped_graphs() -> int:
    """How often Inductor has compiled without the CUDA graph that it was asked for."""
    from torch._dynamo.utils import counters

    return counters["inductor"]["cudagraph_skips"]
