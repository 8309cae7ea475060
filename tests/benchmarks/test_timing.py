"""Timing of the benchmarks, tested with a fake GPU."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
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
    """Replaces torch.cuda: a call takes 2^-17 s in a graph, and 2^-13 s outside of one."""
    gpu = SimpleNamespace(now=0.0, capturing=False, refuses=False, captured=[])

    def call():
        gpu.captured[-1] += gpu.capturing
        gpu.now += 0 if gpu.capturing else 2**-13
        return len(gpu.captured) - 1, gpu.captured[-1]  # number of the graph, and of the call in it

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
    assert fake_gpu.captured == [0, 4, 4 * 33]  # 33 / 2^15 of a second


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
    assert len(made) == 8  # 512 bytes each, read and written: 4096, more than 4000
    outputs = [call() for call in made]
    tensors = seen if name == OURS else outputs
    assert len({x.data_ptr() for x in tensors}) == 8
    assert sum(x.nbytes for x in tensors) == 4096 / 2


@pytest.mark.usefixtures("fake_gpu")
def test_only_bytes_that_a_call_touches_are_compared_to_the_l2_cache():
    """For example, a step reads only one row of the rotary table."""
    table = lambda device, dtype, n: (torch.randn(n, 100),)  # noqa: E731
    made = harness.calls(replace(SUITE, inputs=table), OURS, {"n": 64}, CPU, FP32)
    assert len(made) == 8


@pytest.fixture
def rounds(monkeypatch):
    """Runs `measure` with rounds that take `seconds` on a fake clock → number of rounds."""

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


def test_settling_takes_two_rounds_and_a_tenth_of_a_second(rounds):
    assert rounds(timing.settle_rounds, repeat(1.0)) == 2
    assert rounds(timing.settle_rounds, chain([60.0], repeat(2**-5))) == 1 + 4  # 0.125 s


def test_short_work_is_repeated_more_often(rounds):
    five = partial(timing.repeated, repeats=5)
    assert rounds(five, repeat(1.0)) == 5
    assert rounds(five, repeat(2**-6)) == 13  # 0.203 s
    assert rounds(five, repeat(0.0625)) == 5


def test_repeats_end_when_the_patience_time_is_over(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(timing, "clock", lambda: next(now))
    assert len(timing.repeated(lambda: 1e-3, 2)) == 3
