"""Reads headers and rows of safetensors files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gemma_fast.checkpoint.compressed_weight import Part

# Bytes that are read from a file before it is closed, for each of its tensors. Opening a file takes
# 1 µs per tensor, so this adds 0.1 ms per MB.
KEPT = 1 << 13


class SafetensorsReader:
    """Reads rows of tensors, and keeps files open.

    Opening a file parses its header, which takes 30 ms for the 34,000 tensors of a quantized
    mixture of experts. Closing it releases the memory pages that were read. A file that has changed
    is opened again.
    """

    def __init__(self) -> None:
        self._open: dict[Path, tuple[Any, os.stat_result]] = {}
        self._tensors: dict[Path, int] = {}  # number of tensors
        self._bytes: dict[Path, int] = {}  # that were read since the file was opened

    def header(self, file: Path) -> list[Part]:
        """Returns the tensors of a file in the order of their names."""
        with _readable(file):
            tensors = self._file(file)
            headers = {name: tensors.get_slice(name) for name in sorted(tensors.keys())}
            self._tensors[file] = len(headers)
            return [
                Part(file, name, tuple(header.get_shape()), header.get_dtype())
                for name, header in headers.items()
            ]

    def rows(self, part: Part, start: int, stop: int) -> Tensor:
        """Returns rows `start` to `stop` - 1 of a tensor, or the whole tensor if it has no rows.

        They are a view of the file, whose memory pages stay until the view is deleted.
        """
        with _readable(part.file):
            tensors = self._file(part.file)
            if not part.shape:
                return tensors.get_tensor(part.name)
            rows = tensors.get_slice(part.name)
            if part.expert is None:
                found = rows[start:stop]
            else:
                expert, first = part.expert
                last = first + min(stop, part.shape[0])
                found = rows[expert : expert + 1, first + start : last].squeeze(0)
        self._bytes[part.file] += found.nbytes
        if self._bytes[part.file] >= KEPT * self._tensors[part.file]:
            self._open.pop(part.file, None)
        return found

    def _file(self, file: Path) -> Any:
        status = os.stat(file)
        tensors, opened = self._open.get(file, (None, None))
        if opened is None or not _same(status, opened):
            tensors = safe_open(file, "pt")
            self._open[file], self._bytes[file] = (tensors, status), 0
        return tensors


def _same(a: os.stat_result, b: os.stat_result) -> bool:
    return (a.st_dev, a.st_ino, a.st_size, a.st_mtime_ns) == (
        b.st_dev, b.st_ino, b.st_size, b.st_mtime_ns
    )  # fmt: skip


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"{file} is not a readable safetensors file: {error}; download it again"
        ) from error
