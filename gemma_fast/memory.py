"""Measures a device's free memory, and adds details to out-of-memory errors."""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def free_bytes(device: torch.device) -> float:
    """Returns the bytes that can still be allocated, or infinity if their number is unknown."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return found[0] if found else math.inf


@contextmanager
def out_of_memory(what: str, size: int, device: torch.device, way_out: str) -> Iterator[None]:
    """Turns an out-of-memory error in this context into a torch.OutOfMemoryError with details.

    what     name of the object that does not fit
    size     bytes that it needs; 0: unknown
    way_out  advice to the user
    """
    try:
        yield
    except RuntimeError as error:  # raised by PyTorch (for GPU or CPU memory), the driver or cuBLAS
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
