"""Time per call: device events around replays of a CUDA graph, over caches that hold nothing of it.

Kernels that take microseconds are replayed from a graph, so that no launch is timed. The graph
holds one provider's calls, each with inputs of its own; together they touch more than four times
the L2 cache (see kernels.suite.calls), and each call's outputs live until the capture ends, so none
is written to memory that a cache still holds.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]

REPLAYS, REPLAY_SECONDS = 50, 1e-3  # a replay lasts at least this long
SETTLE = 0.1  # seconds of load before a time counts, so that clocks and power have settled
# Short work is repeated until this many seconds are timed, or have passed.
ENOUGH, PATIENCE = 0.2, 2.0


class Times(NamedTuple):
    """Seconds of one call."""

    median: float
    p20: float
    p80: float


def summary(times: Sequence[float]) -> Times:
    p20, *_, p80 = statistics.quantiles(times, n=5)
    return Times(statistics.median(times), p20, p80)


def device_times(calls: Sequence[Call], check: Callable[[Any], None]) -> tuple[Times, bool]:
    """Times of the current GPU, and whether they are of a graph: not every call can be captured.

    check: is given the first call's output as the last replay left it
    """
    _warm_up(calls)
    try:
        with torch.cuda.stream(torch.cuda.current_stream()):  # a failed capture leaves its own
            seconds, output = _replay_seconds(calls)
    except RuntimeError:  # what PyTorch raises for a capture that something in it forbids
        _forget_capture()
        rounds = event_seconds(lambda: [call() for call in calls], REPLAYS)
        return summary([seconds / len(calls) for seconds in rounds]), False
    check(output)
    return summary(seconds), True


def event_seconds(work: Call, repeats: int) -> list[float]:
    """Seconds that each of `repeats` times work() takes the current GPU."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def settle(work: Call, seconds: float = SETTLE) -> None:
    """Keeps the current GPU at the work for so long."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        event_seconds(work, 3)


def settle_rounds(once: Call) -> None:
    """Two rounds at least; of load SETTLE seconds, not counting the first: it may compile."""
    once()
    end = clock() + SETTLE
    once()
    while clock() < end:
        once()


def repeated(once: Callable[[], float], repeats: int) -> list[float]:
    """The seconds that once() gives, `repeats` times; short ones more often, see ENOUGH."""
    end = clock() + PATIENCE
    seconds: list[float] = []
    while len(seconds) < repeats or (sum(seconds) < ENOUGH and clock() < end):
        seconds.append(once())
    return seconds


def _forget_capture() -> None:
    """A failed capture may leave the generator of random numbers capturing: randn would raise."""
    torch.cuda.synchronize()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(torch.Generator("cuda"))


def _warm_up(calls: Sequence[Call]) -> None:
    """Compilers, autotuners and handles are done after it; on a side stream, as capture asks."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in [*calls[:1], *calls, *calls]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def _replay_seconds(calls: Sequence[Call]) -> tuple[list[float], Any]:
    """Seconds a call, one figure a replay; and the first call's output after the last one."""
    graph, output = _capture(calls)
    cycles = math.ceil(REPLAY_SECONDS / min(event_seconds(graph.replay, 3)))
    if cycles > 1:
        graph, output = _capture([*calls] * cycles)
    settle(graph.replay)
    seconds = [s / (cycles * len(calls)) for s in event_seconds(graph.replay, REPLAYS)]
    return seconds, output


def _capture(calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The graph, and the memory of its first call's output."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: calls of other threads, a compiler's for one, do not end the capture.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = [call() for call in calls]
    return graph, outputs[0]  # the others live until here: each call has memory of its own


def clock() -> float:
    """Seconds, once the GPU has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def wall_seconds(call: Call) -> float:
    start = clock()
    call()
    return clock() - start
