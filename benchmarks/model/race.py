"""Measures prefill (pp) and decode (tg) speed of a whole model. Test names are as in llama-bench:

    pp512          prefill of 512 tokens, until the first new token
    tg128          128 decode steps
    tg128 @ d4096  the same, with 4096 tokens already in the cache; see cases.py

A test is repeated several times. Each repeat is timed as a whole, after the device's clock rates
have settled. The timer waits for the device at the start and at the end; tokens are not read back
in between. The times of single tokens come from one additional pass. On a GPU it records a device
event after each step, so the host can launch later steps ahead. On a CPU it uses the wall clock.

Before a provider is timed, judge.py checks it, with at least as many tokens in its cache as in the
test, if the context allows. In float32, its greedy tokens must equal the reference's. In a 16-bit
dtype, the reference computes in float32 with the same weights: the logits that it gives to the
provider's greedy tokens must be close to its largest logits. Also, our error must not be much
larger than transformers' (see judge.SLACK). A wrong provider is not timed.
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
from gemma_fast.benchmarks.model.cases import NEW, PROMPT, Case, weights_bytes
from gemma_fast.benchmarks.model.judge import Judge
from gemma_fast.benchmarks.model.providers import BESIDE_PACKED, PROVIDERS, Provider
from gemma_fast.checkpoint.base import Checkpoint


@dataclass(frozen=True)
class ModelResult:
    """The result of one provider in one case.

    seconds: time of each repeat; token_seconds: time of each decode step in the additional pass
    """

    case: Case
    provider: str
    status: str
    work: Work
    error: float | None = None  # see judge.Judge
    seconds: tuple[float, ...] = ()
    token_seconds: tuple[float, ...] = ()
    peak_bytes: int | None = None  # GPU memory; includes weights and graphs, not the judge
    memory: dict[str, float] = field(default_factory=dict)
    size_bytes: float | None = None  # of the weights; None: not known
    took: float = 0.0  # total seconds; a provider's first result includes loading its weights

    @property
    def cell(self) -> Case:
        """Returns the case. Only results with the same cell are compared with each other."""
        return self.case

    @property
    def typical(self) -> float | None:
        return statistics.fmean(self.seconds) if self.seconds else None

    def figures(self, roof: Roof | None) -> dict[str, Any]:
        """Returns rates, times and memory, or an empty dict if the result was not timed. Rates
        count the tokens of all sequences in the batch."""
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
    """Yields the results of each provider, in the order of PROVIDERS. In this order, transformers
    runs before gemma_fast, because the judge compares our error with transformers'. Without a roof,
    nothing is timed."""
    config = checkpoint.config
    for name in (name for name in PROVIDERS if name in names):
        kind = BESIDE_PACKED.get(name, dtype)
        results = [
            ModelResult(case, name, case.status(config), case.work(config, kind.itemsize))
            for case in cases
        ]
        try:
            clear()
            before = torch.cuda.memory_reserved() if device.type == "cuda" else 0
            provider = PROVIDERS[name](checkpoint, kind, device)
            sizes = provider.sizes()
        except Exception as problem:  # a rival may raise any exception
            status = verdict(problem)
            yield from (replace(result, status=status) for result in results)
            continue
        for result in results:
            if result.status == "ok":
                result = replace(
                    result, work=result.case.work(config, kind.itemsize, sizes),
                    size_bytes=weights_bytes(config, kind.itemsize, sizes),
                )  # fmt: skip
                result = race(provider, result, kind, device, before, roof, repeats, judge)
            yield result
        del provider


def race(
    provider: Provider, result: ModelResult, dtype: torch.dtype, device: torch.device, before: int,
    roof: Roof | None, repeats: int, judge: Judge,
) -> ModelResult:  # fmt: skip
    """Checks and times one provider in one case.

    dtype: of the provider's logits
    before: bytes of GPU memory that were reserved before the provider was loaded
    """
    case = result.case
    try:
        clear()
        skipped = skipped_graphs()
        provider.start(case.batch, max(judge.room(case), case.room), case.kind)
        result = replace(result, error=judge.check(result.provider, provider, case, dtype))
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
        torch.cuda.empty_cache()  # frees the judge's memory
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
    if cuda and times > 1.25:  # e.g. an empty graph, or a clock that did not wait
        raise Wrong(f"{times:.2g} times the roof's speed, {floor:.2g} s")
    return replace(
        result, seconds=tuple(seconds), token_seconds=tuple(token_seconds), peak_bytes=peak,
        memory=provider.memory(),
    )  # fmt: skip


def step_seconds(step: Callable[[], Tensor], steps: int, cuda: bool) -> list[float]:
    """Returns the seconds of each step. On a GPU, a step is timed from the end of the previous step
    to its own end."""
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
    """Frees memory and resets Dynamo, so that providers do not affect each other."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def skipped_graphs() -> int:
    """Returns how often Inductor has skipped a CUDA graph that was requested."""
    from torch._dynamo.utils import counters

    return counters["inductor"]["cudagraph_skips"]
