"""Measures how much of the machine other processes use during a run."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STAT = Path("/proc/stat")
BUSY = 0.05  # share of all cores; figures of a run in which others used more are not compared


class Load:
    """The load of the machine since this object was created.

    Only Linux counts the CPU time of all processes; on other systems the load is unknown.
    """

    def __init__(self) -> None:
        self.start, self.before = time.perf_counter(), _average()
        self.busy, self.own = _busy_seconds(), _own_seconds()

    def so_far(self) -> dict[str, Any] | None:
        """Returns the load averages before the run and now, the machine's cores, and how many of
        them other processes used on average. Returns None if that is unknown.

        Time that a hypervisor gave to other virtual machines counts as used by others.
        """
        if self.busy is None or (busy := _busy_seconds()) is None:
            return None
        wall = max(time.perf_counter() - self.start, 1e-9)
        others = (busy - self.busy - (_own_seconds() - self.own)) / wall
        return {
            "average_before": self.before, "average_after": _average(),
            "others": round(max(others, 0.0), 3), "cores": os.cpu_count() or 1,
        }  # fmt: skip


def is_busy(load: Mapping[str, Any] | None) -> bool:
    return load is not None and load["others"] > BUSY * load["cores"]


def in_words(load: Mapping[str, Any] | None) -> str:
    """Returns sentences that describe the load (see Load.so_far) for a report."""
    if load is None:
        return "The load by other processes is unknown."
    used = f"Other processes used {load['others']:.2g} of {load['cores']} cores during this run"
    warning = ": its figures are not to be compared" if is_busy(load) else ""
    averages = f"load average {load['average_before']} before, {load['average_after']} after"
    return f"{used}{warning} ({averages})."


def _average() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):  # Windows has no load average
        return None


def _own_seconds() -> float:
    """Returns the CPU seconds of this process, and of its child processes that have ended."""
    return sum(os.times()[:4])


def _busy_seconds() -> float | None:
    """Returns the CPU seconds that all cores have worked since boot. Returns None if unknown."""
    try:
        first = STAT.read_text(encoding="ascii").split("\n", 1)[0].split()
        # cpu user nice system idle iowait irq softirq steal …, in ticks
        ticks = [int(x) for x in first[1:9]]
        return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
