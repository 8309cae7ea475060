"""Tests how the load by other processes is measured."""

import os
import time
from types import SimpleNamespace

import pytest

from gemma_fast.benchmarks.measure import load


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with two cores and 100 ticks a second, whose times the test sets."""
    now = SimpleNamespace(wall=0.0, own=(1.0, 0.0, 0.0, 0.0), busy=[100, 0, 0, 0, 0, 0, 0, 0])

    def write():
        numbers = " ".join(map(str, now.busy))
        now.file.write_text(f"cpu  {numbers} 0 0\ncpu0 {numbers} 0 0\n")

    now.file, now.write = tmp_path / "stat", write
    monkeypatch.setattr(load, "STAT", now.file)
    monkeypatch.setattr(time, "perf_counter", lambda: now.wall)
    monkeypatch.setattr(os, "times", lambda: (*now.own, now.wall))
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.123, 9.0, 9.0))
    write()
    return now


def test_cpu_time_beyond_our_own_is_that_of_other_processes(machine):
    watch = load.Load()
    machine.wall, machine.own = 10.0, (9.0, 2.0, 0.5, 0.5)  # 11 s of ours, children included
    # user, nice, system, idle, iowait, irq, softirq, steal: 12 s of work, and 8 s without any
    machine.busy = [100 + 1000, 50, 50, 700, 100, 30, 30, 40]
    machine.write()
    found = watch.so_far()
    assert found == {"average_before": 0.12, "average_after": 0.12, "others": 0.1, "cores": 2}
    assert not load.is_busy(found) and load.is_busy(found | {"others": 0.11})


def test_load_is_unknown_if_the_system_does_not_count_it(machine):
    machine.file.write_text("cpu  none")
    assert load.Load().so_far() is None
    machine.file.unlink()
    assert load.Load().so_far() is None
    assert not load.is_busy(None) and load.in_words(None).endswith("unknown.")


@pytest.mark.skipif(not load.STAT.exists(), reason="the system does not count CPU time")
def test_load_of_this_machine_is_less_than_its_cores():
    watch = load.Load()
    time.sleep(0.2)
    found = watch.so_far()
    assert 0 <= found["others"] <= found["cores"] * 1.2
