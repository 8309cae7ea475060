"""Tests the timing of the benchmarks with a fake GPU."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import chain, repeat
from types import SimpleNamespace

import pytest
import torch
from example_suite import SUITE

from gemma_fast.benchmarks.kernels import suite as harness
from gemma_fast.benchmarks.measure import timing
from gemma_fast.benchmarks.measure.outcome import COPY, OURS

CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.fixture
def fake_gpu(monkeypatch):
    """Replaces torch.cuda. A call takes 2^-17 s in a CUDA graph, and 2^-13 s outside a graph."""
    gpu = SimpleNamespace(now=0.0, capturing=False, refuses=False, captured=[])

    def call():
        gpu.captured[-1] += gpu.capturing
        gpu.now += 0 if gpu.capturing else 2**-13
        # number of the graph, and number of the call in the graph
        return len(gpu.captured) - 1, gpu.captured[-1]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = gpu.now

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3  # ms

    class CUDAGraph:
        def replay(self):
            gpu.now += 2**-17 * self.calls

    @contextmanager
    def graph(made, capture_error_mode):
        assert capture_error_mode == "thread_local"
        gpu.captured.append(0)
        gpu.capturing = True
        yield
        gpu.capturing, made.calls = False, gpu.captured[-1]
        if gpu.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")

    gpu.call, gpu.captured, gpu.forgotten = call, [0], 0

    def forget(state):
        gpu.forgotten += 1

    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "Event": Event, "CUDAGraph": CUDAGraph, "graph": graph, "synchronize": lambda: None,
        "Stream": lambda: stream, "current_stream": lambda: stream, "stream": nullcontext,
        "current_device": lambda: 0,
        "default_generators": [SimpleNamespace(graphsafe_set_state=forget)],
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1000),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "Generator", lambda device: None)
    monkeypatch.setattr(timing, "SETTLE", 0)
    return gpu


def test_graph_repeats_the_calls_until_a_replay_is_long_enough(fake_gpu):
    left = []
    times, graph = timing.device_times([fake_gpu.call] * 4, left.append)
    assert graph and times == pytest.approx((2**-17,) * 3)
    assert left == [(2, 1)]
    assert fake_gpu.captured == [0, 4, 4 * 33]  # 33 * 2^-15 s are at least 1 ms


def test_calls_that_cannot_be_captured_are_timed_with_their_launches(fake_gpu):
    fake_gpu.refuses = True
    times, graph = timing.device_times([fake_gpu.call] * 4, pytest.fail)
    assert not graph and times == pytest.approx((2**-13,) * 3)
    assert fake_gpu.forgotten == 1


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize("name", [OURS, COPY])
def test_input_sets_are_larger_than_four_l2_caches(name):
    seen = []
    providers = {OURS: lambda x: lambda: seen.append(x)}
    made = harness.calls(replace(SUITE, providers=providers), name, {"n": 64}, CPU, FP32)
    assert len(made) == 8  # 8 calls touch 8 * 512 bytes, more than 4 * 1000
    outputs = [call() for call in made]
    tensors = seen if name == OURS else outputs
    assert len({x.data_ptr() for x in tensors}) == 8
    assert sum(x.nbytes for x in tensors) == 4096 / 2


@pytest.mark.usefixtures("fake_gpu")
def test_only_bytes_that_a_call_touches_are_compared_to_the_l2_cache():
    """For example, a decode step reads only one row of the table of rotary angles."""
    table = lambda device, dtype, n: (torch.randn(n, 100),)  # noqa: E731
    made = harness.calls(replace(SUITE, inputs=table), OURS, {"n": 64}, CPU, FP32)
    assert len(made) == 8


@pytest.fixture
def rounds(monkeypatch):
    """Returns run(measure, seconds), which returns how often measure(once) calls once().

    Each call takes the next of `seconds` on a fake clock.
    """

    def run(measure, seconds):
        now, seen = [0.0], []

        def once():
            seen.append(next(seconds))
            now[0] += seen[-1]
            return seen[-1]

        monkeypatch.setattr(timing, "clock", lambda: now[0])
        measure(once)
        return len(seen)

    return run


def test_settling_takes_at_least_two_calls_and_a_tenth_of_a_second(rounds):
    assert rounds(timing.settle_rounds, repeat(1.0)) == 2
    # after the first call, four calls take 0.125 s
    assert rounds(timing.settle_rounds, chain([60.0], repeat(2**-5))) == 1 + 4


def test_short_calls_are_repeated_until_they_take_a_fifth_of_a_second(rounds):
    five = lambda once: timing.interleaved([once], repeats=5)  # noqa: E731
    assert rounds(five, repeat(1.0)) == 5
    assert rounds(five, repeat(2**-6)) == 13  # 13 calls take 0.203 s
    assert rounds(five, repeat(0.0625)) == 5


def test_short_calls_are_not_repeated_for_more_than_two_seconds(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(timing, "clock", lambda: next(now))
    assert timing.interleaved([lambda: 1e-3], 2) == [[1e-3] * 3]


def test_calls_take_turns_until_each_has_enough_repeats():
    order = []

    def call(name, seconds):
        return lambda: order.append(name) or next(seconds)

    calls = [
        call("long", repeat(1.0)), call("short", repeat(0.09)),
        call("fails", iter([1.0, None])),  # not called again after None
    ]  # fmt: skip
    found = timing.interleaved(calls, 2)
    assert found == [[1.0] * 2, [0.09] * 3, [1.0]]
    assert order == ["long", "short", "fails", "long", "short", "fails", "short"]
