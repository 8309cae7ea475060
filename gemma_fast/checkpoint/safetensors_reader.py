"""Reads headers and rows of safetensors files.

The library safetensors checks the header, and its offsets say where the tensors are. Rows are then
read without the library: it would parse the header again for every tensor, or would keep the whole
file mapped, with all memory pages that were read. In a quantized mixture of experts the header has
34,000 tensors, which take 30 ms.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gemma_fast.checkpoint.compressed_weight import Part

# Types that can be read, by their names in the files.
TYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "U8": torch.uint8, "I32": torch.int32,
    "I64": torch.int64,
}  # fmt: skip


def read_header(file: Path) -> list[Part]:
    """Returns the tensors of a file in the order of their names. Raises ValueError for a malformed
    file."""
    try:
        with safe_open(file, "np") as tensors, file.open("rb") as data:
            names = sorted(tensors.keys())
            size = int.from_bytes(data.read(8), "little")
            header: dict[str, Any] = json.loads(data.read(size))
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{file} is not a readable safetensors file: {error}; download it again"
        ) from error
    parts = []
    for name in names:
        found = header[name]
        start, _ = found["data_offsets"]
        parts.append(Part(file, name, tuple(found["shape"]), found["dtype"], 8 + size + start))
    return parts


def read_rows(part: Part, start: int, stop: int) -> Tensor:
    """Returns rows `start` to `stop` - 1 of a tensor, or the whole tensor if it has no rows.

    They are a view of the file. Writing to it does not change the file. Raises ValueError if the
    file has become shorter.
    """
    dtype = TYPES[part.dtype]
    shape = part.shape and (max(min(stop, part.shape[0]) - start, 0), *part.shape[1:])
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    offset = part.offset + start * math.prod(part.shape[1:]) * dtype.itemsize
    # Map the file in each call, because unmapping releases the memory pages that were read.
    try:
        stored = np.memmap(part.file, np.uint8, "c", offset, (size,))
    except ValueError as error:
        raise part.error(f"cannot be read: {error}; the file has changed") from error
    return torch.from_numpy(stored).view(dtype).view(shape)
