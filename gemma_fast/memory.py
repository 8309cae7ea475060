"""Free memory of a device, and out-of-memory errors that name what did not fit."""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def free_bytes(device: torch.device) -> float:
    """Returns the bytes that can still be allocated, or infinity if the system has no figure."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return found[0] if found else math.inf


@contextmanager
def out_of_memory(what: str, size: int, device: torch.device, way_out: str) -> Iterator[None]:
    """Context in which an out-of-memory error is raised again with details.

    The torch.OutOfMemoryError names `what` did not fit, its `size` in bytes (0: unknown), the free
    memory, and the way out.
    """
    try:
        yield
    except RuntimeError as error:  # from PyTorch, the driver, cuBLAS or the CPU
        if not re.search("out of memory|allocate memory|ALLOC_FAILED", str(error)):
            raise
        traceback.clear_frames(error.__traceback__)  # frames keep partial results alive
        needed = f" takes {size / 1e9:.2f} GB" if size else ""
        free = ""
        if device.type == "cuda":
            free = f", {free_bytes(device) / 1e9:.2f} GB are free"
        raise torch.OutOfMemoryError(
            f"out of memory: {what}{needed}{free} on {device}; try {way_out}"
        ) from error
