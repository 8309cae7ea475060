"""One provider in one case: it is checked, warmed up and timed. Its first failure ends it."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from gemma_fast.benchmarks.measure.machine import Roof, dtype_name
from gemma_fast.benchmarks.measure.model_report import label
from gemma_fast.benchmarks.measure.outcome import WITHOUT_GRAPHS, Wrong, verdict
from gemma_fast.benchmarks.measure.timing import clock, settle_rounds, wall_seconds
from gemma_fast.benchmarks.model.cases import NEW, NO_SIZES, PROMPT, Case, weights_bytes
from gemma_fast.benchmarks.model.judge import Judge
from gemma_fast.benchmarks.model.providers import OWN_DTYPES, Loader, Provider
from gemma_fast.benchmarks.model.result import ModelResult
from gemma_fast.checkpoint.base import Checkpoint

T = TypeVar("T")


class Loaded:
    """A provider with its weights in one dtype; or, if it cannot be loaded, the status that says
    why."""

    def __init__(
        self, name: str, load: Loader, dtype: torch.dtype, checkpoint: Checkpoint,
        device: torch.device,
    ) -> None:  # fmt: skip
        start = time.perf_counter()
        self.name, self.dtype, self.config = name, dtype, checkpoint.config
        self.shown = None if name in OWN_DTYPES else dtype_name(dtype)
        self.label = label(name, self.shown)
        self.provider: Provider | None = None
        self.sizes, self.status = NO_SIZES, "ok"
        # Errors that the judge has found, by batch size, room and length of the prefix.
        self.errors: dict[tuple[int, int, int], float] = {}
        try:
            clear()
            self.reserved = torch.cuda.memory_reserved() if device.type == "cuda" else 0
            self.provider = load(checkpoint, dtype, device)
            self.sizes = self.provider.sizes()
        except Exception as problem:  # a rival may raise any exception
            self.status = verdict(problem)
        self.took = time.perf_counter() - start
        self.told = self.status if self.status != "ok" else f"loaded in {self.took:.1f} s"

    def result(self, case: Case) -> ModelResult:
        """Returns the result before the case is run."""
        status = case.status(self.config) if self.status == "ok" else self.status
        known = None
        if self.provider is not None:
            known = weights_bytes(self.config, self.dtype.itemsize, self.sizes)
        took, self.took = self.took, 0.0
        return ModelResult(
            case, self.name, self.shown, status,
            case.work(self.config, self.dtype.itemsize, self.sizes), size_bytes=known, took=took,
        )  # fmt: skip


class Attempt:
    """A loaded provider in one case, with its result so far."""

    def __init__(self, loaded: Loaded, case: Case, device: torch.device) -> None:
        self.loaded, self.case, self.device = loaded, case, device
        self.provider: Any = loaded.provider  # None only if the status is not ok
        self.result = loaded.result(case)
        self.cuda, self.skipped = device.type == "cuda", 0

    def do(self, step: Callable[[], T]) -> T | None:
        """Calls step(), unless an earlier step has failed. Returns its output, or None after a
        failure, whose verdict becomes the result's status."""
        if self.result.status != "ok":
            return None
        start, skipped, output = time.perf_counter(), skipped_graphs(), None
        try:
            output = step()
        except Exception as problem:  # a rival may raise any exception
            self.result = replace(self.result, status=verdict(problem))
        self.skipped += skipped_graphs() - skipped
        took = self.result.took + time.perf_counter() - start
        self.result = replace(self.result, took=took)
        return output

    def check(self, judge: Judge) -> None:
        """Raises Wrong if the provider's tokens or logits are wrong. A check that an earlier case
        has passed, with the same room and prefix, is not repeated."""
        case, errors = self.case, self.loaded.errors
        room = max(judge.room(case), case.room)
        self.provider.start(case.batch, room, case.kind)
        key = case.batch, room, judge.prefix(case)
        if key not in errors:
            errors[key] = judge.check(self.loaded.name, self.provider, case, self.loaded.dtype)
        self.result = replace(self.result, error=errors[key])

    def warm_up(self, vocab_size: int) -> None:
        case, generator = self.case, torch.Generator().manual_seed(1)
        ids = torch.randint(3, vocab_size, (case.batch, case.room), generator=generator)
        self.before, self.rest = ids.to(self.device).split([case.before, case.tokens], dim=1)
        if self.cuda:
            forget_judge()
            settle_rounds(self.once)
        else:
            self.once()

    def once(self) -> float:
        """Runs the case once, and returns its seconds. Filling the cache is not timed."""
        provider, case = self.provider, self.case
        if case.before:
            provider.prefill(self.before)
        start = clock()
        if case.kind == PROMPT:
            (provider.extend if case.before else provider.prefill)(self.rest)
        else:
            for _ in range(case.tokens):
                provider.step()
        return clock() - start

    def finish(self, seconds: list[float], roof: Roof) -> None:
        """Times single tokens, and adds all times and the memory to the result.

        seconds: of each repeat
        """
        token_seconds: list[float] = []
        if self.case.kind == NEW:
            self.provider.prefill(self.before)
            token_seconds = step_seconds(self.provider.step, self.case.tokens, self.cuda)
        peak = torch.cuda.max_memory_reserved() - self.loaded.reserved if self.cuda else None
        floor = roof.of(self.result.dtype).floor(self.result.work)
        times = floor / statistics.median(seconds)
        if self.cuda and times > 1.25:  # e.g. an empty graph, or a clock that did not wait
            raise Wrong(f"{times:.2g} times the roof's speed, {floor:.2g} s")
        self.result = replace(
            self.result, seconds=tuple(seconds), token_seconds=tuple(token_seconds),
            peak_bytes=peak, memory=self.provider.memory(),
            status=WITHOUT_GRAPHS if self.skipped else "ok",
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
    """Frees memory and resets Dynamo, so that earlier groups and cases do not affect later ones."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def forget_judge() -> None:
    """Frees the judge's GPU memory, so that the peak is the provider's."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def skipped_graphs() -> int:
    """Returns how often Inductor has skipped a CUDA graph that was requested."""
    from torch._dynamo.utils import counters

    return counters["inductor"]["cudagraph_skips"]
