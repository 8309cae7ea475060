"""Free memory of a device, and errors that say what did not fit."""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def free_bytes(device: torch.device) -> float:
    """Bytes that can still be allocated; infinite where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return found[0] if found else math.inf


@contextmanager
def out_of_memory(what: str, size: int, device: torch.device, way_out: str) -> Iterator[None]:
    """Raises an OutOfMemoryError that names what did not fit, its `size` in bytes (0: unknown),
    what was free, and the way out."""
    try:
        yield
    except RuntimeError as error:  # PyTorch's, the driver's, cuBLAS', the CPU's
        if not re.search("out of memory|allocate memory|ALLOC_FAILED", str(error)):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold what was made so far
        needed = f" takes {size / 1e9:.2f} GB" if size else ""
        free = ""
        if device.type == "cuda":
            free = f", {free_bytes(device) / 1e9:.2f} GB are free"
        raise torch.OutOfMemoryError(
            f"out of memory: {what}{needed}{free} on {device}; try {way_out}"
        ) from error
