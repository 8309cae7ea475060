"""Measures the time per call with a cold L2 cache, by device events around CUDA graph replays.

Kernels that take microseconds are replayed from a graph, so that launches are not timed. The graph
contains one provider's calls, each with its own inputs. Together, these calls read and write more
than four times the size of the L2 cache (see `calls` in benchmarks/kernels/suite.py). The outputs
of each call are kept until the capture ends, so that no output is written to memory that is still
in the cache.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]

REPLAYS, REPLAY_SECONDS = 50, 1e-3  # number of replays; minimum seconds of each replay
SETTLE = 0.1  # seconds of load before timing, so that clock rates and power have settled
# Short calls are repeated until ENOUGH seconds are timed or PATIENCE seconds have passed.
ENOUGH, PATIENCE = 0.2, 2.0


class Times(NamedTuple):
    """Seconds of one call: median and percentiles."""

    median: float
    p20: float
    p80: float


def summary(times: Sequence[float]) -> Times:
    p20, *_, p80 = statistics.quantiles(times, n=5)
    return Times(statistics.median(times), p20, p80)


def device_times(calls: Sequence[Call], check: Callable[[Any], None]) -> tuple[Times, bool]:
    """Returns the times of a call on the current GPU, and whether a CUDA graph was timed (False if
    a call cannot be captured).

    check: is called with the output of calls[0] after the last replay, if a graph was timed
    """
    _warm_up(calls)
    try:
        # A failed capture leaves its own stream current; this `with` restores ours.
        with torch.cuda.stream(torch.cuda.current_stream()):
            seconds, output = _replay_seconds(calls)
    except RuntimeError:  # raised by PyTorch if a call cannot be captured
        _forget_capture()
        rounds = event_seconds(lambda: [call() for call in calls], REPLAYS)
        return summary([seconds / len(calls) for seconds in rounds]), False
    check(output)
    return summary(seconds), True


def event_seconds(work: Call, repeats: int) -> list[float]:
    """Calls work() `repeats` times. Returns the seconds of each call on the current GPU."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def settle(work: Call, seconds: float = SETTLE) -> None:
    """Repeats the work on the current GPU for `seconds`."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        event_seconds(work, 3)


def settle_rounds(once: Call) -> None:
    """Calls once(), which may compile, then calls it again at least once and for SETTLE seconds."""
    once()
    end = clock() + SETTLE
    once()
    while clock() < end:
        once()


def interleaved(calls: Sequence[Callable[[], float | None]], repeats: int) -> list[list[float]]:
    """Calls each function `repeats` times, or more often if it is short (see ENOUGH). The functions
    take turns, so that a change of the machine's speed affects all of them.

    Returns the seconds that each function returned. A function that returns None is not called
    again.
    """
    end = clock() + PATIENCE * len(calls)
    seconds: list[list[float]] = [[] for _ in calls]
    waiting = dict(enumerate(calls))
    while waiting:
        for i, call in [*waiting.items()]:
            taken = call()
            if taken is not None:
                seconds[i].append(taken)
            many = len(seconds[i]) >= repeats
            if taken is None or (many and (sum(seconds[i]) >= ENOUGH or clock() >= end)):
                del waiting[i]
    return seconds


def _forget_capture() -> None:
    """Resets the random generator. A failed capture may leave it in capture mode, in which randn
    raises."""
    torch.cuda.synchronize()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(torch.Generator("cuda"))


def _warm_up(calls: Sequence[Call]) -> None:
    """Runs the calls, so that they compile, autotune and create handles. They run on a side stream,
    as capture requires."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in [*calls[:1], *calls, *calls]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def _replay_seconds(calls: Sequence[Call]) -> tuple[list[float], Any]:
    """Returns the seconds per call of each replay, and calls[0]'s output after the last replay."""
    graph, output = _capture(calls)
    cycles = math.ceil(REPLAY_SECONDS / min(event_seconds(graph.replay, 3)))
    if cycles > 1:
        graph, output = _capture([*calls] * cycles)
    settle(graph.replay)
    seconds = [s / (cycles * len(calls)) for s in event_seconds(graph.replay, REPLAYS)]
    return seconds, output


def _capture(calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Captures all calls in one CUDA graph. Returns the graph and the output of calls[0], which
    each replay overwrites."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: calls of other threads, such as a compiler's, do not end the capture.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = [call() for call in calls]
    return graph, outputs[0]  # all outputs are kept until here, so they share no memory


def clock() -> float:
    """Waits for the GPU, and returns the time in seconds."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def wall_seconds(call: Call) -> float:
    start = clock()
    call()
    return clock() - start
