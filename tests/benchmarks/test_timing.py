"""How the benchmarks time, with something that stands in for a GPU."""

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
    """Stands in for torch.cuda: a call takes 2^-17 s in a graph, and 2^-13 with its launch."""
    gpu = SimpleNamespace(now=0.0, capturing=False, refuses=False, captured=[])

    def call():
        gpu.captured[-1] += gpu.capturing
        gpu.now += 0 if gpu.capturing else 2**-13
        return len(gpu.captured) - 1, gpu.captured[-1]  # which graph, and its how manieth call

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


def test_graph_cycles_until_a_replay_is_long_enough(fake_gpu):
    left = []
    times, graph = timing.device_times([fake_gpu.call] * 4, left.append)
    assert graph and times == pytest.approx((2**-17,) * 3)
    assert left == [(2, 1)]
    assert fake_gpu.captured == [0, 4, 4 * 33]  # 33 / 2^15 of a second


def test_what_cannot_be_captured_is_timed_with_its_launches(fake_gpu):
    fake_gpu.refuses = True
    times, graph = timing.device_times([fake_gpu.call] * 4, pytest.fail)
    assert not graph and times == pytest.approx((2**-13,) * 3)
    assert fake_gpu.forgotten == 1


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize("name", [OURS, COPY])
def test_sets_of_inputs_pass_four_times_the_l2_cache(name):
    seen = []
    providers = {OURS: lambda x: lambda: seen.append(x)}
    made = harness.calls(replace(SUITE, providers=providers), name, {"n": 64}, CPU, FP32)
    assert len(made) == 8  # 512 bytes each, read and written: 4096, more than 4000
    outputs = [call() for call in made]
    tensors = seen if name == OURS else outputs
    assert len({x.data_ptr() for x in tensors}) == 8
    assert sum(x.nbytes for x in tensors) == 4096 / 2


@pytest.mark.usefixtures("fake_gpu")
def test_what_is_held_and_not_touched_does_not_count():
    """As the rotary table is, of which a step reads one row."""
    table = lambda device, dtype, n: (torch.randn(n, 100),)  # noqa: E731
    made = harness.calls(replace(SUITE, inputs=table), OURS, {"n": 64}, CPU, FP32)
    assert len(made) == 8


@pytest.fixture
def rounds(monkeypatch):
    """Runs rounds of so many seconds by a clock of their own → how many there were."""

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


def test_clocks_settle_before_a_time_counts(rounds):
    assert rounds(timing.settle_rounds, repeat(1.0)) == 2
    assert rounds(timing.settle_rounds, chain([60.0], repeat(2**-5))) == 1 + 4  # 0.125 s


def test_short_work_is_repeated_more_often(rounds):
    five = partial(timing.repeated, repeats=5)
    assert rounds(five, repeat(1.0)) == 5
    assert rounds(five, repeat(2**-6)) == 13  # 0.203 s
    assert rounds(five, repeat(0.0625)) == 5


def test_repeats_end_where_all_else_takes_long(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(timing, "clock", lambda: next(now))
    assert len(timing.repeated(lambda: 1e-3, 2)) == 3
