"""Reads metadata, tensor headers and dequantized rows from GGUF files, and checks all bounds,
because the files are untrusted.

This module is imported only when a GGUF file is opened, so that the package `gguf` stays optional.
"""

import math
import os
import struct
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

try:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType
    from gguf.gguf_reader import ReaderField, ReaderTensor
    from gguf.quants import dequantize
except ModuleNotFoundError as error:
    raise ImportError('GGUF files need the package gguf: pip install "gemma_fast[gguf]"') from error

MAX_STRING = 1 << 20  # bytes; the longest string in a Gemma file is the chat template
MAX_ARRAY = 1 << 20  # items; the longest array in a Gemma file is the vocabulary or the merges
MAX_DIMS = 4


class GGUFFile(GGUFReader):
    """A `gguf.GGUFReader` that is safe for hostile files and fast for long arrays.

    The base class does not check bounds, multiplies dimensions in uint64, which can overflow, and
    reads arrays item by item (9 s for a vocabulary of 262,144). The methods that this class
    overrides are private, so setup.py pins `gguf` to one version.

    `metadata` contains the file's key/value pairs as Python scalars, strings and lists. (The base
    class's `fields` have no contents for arrays.) Raises ValueError, with the path, for a malformed
    file. Memory use is proportional to the file's size.
    """

    metadata: dict[str, Any]

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            super().__init__(self.path)
            self.metadata = {
                name: field.parts[-1] if isinstance(field.parts[-1], list) else field.contents()
                for name, field in self.fields.items()
                if not name.startswith("GGUF.")  # header fields: version and counts
            }
        except (ValueError, KeyError, OverflowError) as error:
            reason = error.args[0] if isinstance(error, KeyError) else error
            raise ValueError(
                f"{self.path} is not a readable GGUF file: {reason}; download or convert it again"
            ) from error

    def _get(self, offset, dtype, count=1, override_order=None):
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(
                f"truncated: {end} bytes are needed, but the file has {len(self.data)}"
            )
        return super()._get(int(offset), dtype, int(count), override_order)

    def _get_str(self, offset):
        length = int(self._get(offset, np.uint64)[0])
        if length > MAX_STRING:
            raise ValueError(f"a string of {length} bytes at byte {offset} is too long")
        return super()._get_str(offset)

    def _build_fields(self, offs, count):
        if self.byte_order == "S":
            raise ValueError("its byte order differs from this machine's")
        return super()._build_fields(offs, count)

    def _get_field_parts(self, orig_offs, raw_type):
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        head = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
        item_type, count = GGUFValueType(head[0][0]), int(head[1][0])
        if count > MAX_ARRAY:
            raise ValueError(f"an array of {count} items at byte {orig_offs} is too long")

        start = orig_offs + 12
        if item_type == GGUFValueType.STRING:
            items, size = self._get_strings(start, count)
        elif item_type in self.gguf_scalar_to_np:
            stored = self._get(start, self.gguf_scalar_to_np[item_type], count)
            items, size = stored.tolist(), stored.nbytes
        else:
            raise ValueError(f"an array of {item_type.name} at byte {orig_offs} is not supported")
        return 12 + size, [*head, items], [len(head)], [GGUFValueType.ARRAY, item_type]

    def _get_strings(self, start: int, count: int) -> tuple[list[str], int]:
        """Reads `count` strings from byte `start` on. Returns them and the number of bytes read."""
        data: Any = self.data.base  # a mmap, whose slices are bytes
        items, offset, end = [], start, len(data)
        length_at = struct.Struct("<Q").unpack_from
        for _ in range(count):
            try:
                (length,) = length_at(data, offset)
            except struct.error:
                text = f"truncated: an array of {count} strings runs past the end"
                raise ValueError(text) from None
            first = offset + 8
            offset = first + length
            if offset > end:
                raise ValueError(
                    f"a string of {length} bytes at byte {first - 8} runs past the end"
                )
            items.append(data[first:offset].decode())
        return items, offset - start

    def _get_tensor_info_field(self, orig_offs) -> ReaderField:
        field = super()._get_tensor_info_field(orig_offs)
        _, _, _, dims, raw_type, offset = field.parts
        if not 1 <= len(dims) <= MAX_DIMS:
            raise ValueError(
                f"tensor {field.name!r} has {len(dims)} dimensions, which is not supported"
            )
        # Python's integers do not overflow. If the size passes this check, the base class's uint64
        # does not overflow either.
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(raw_type[0])]
        n_bytes = math.prod(dims.tolist()) // block * block_bytes
        if not 0 < n_bytes <= len(self.data) or offset[0] > len(self.data):
            raise ValueError(
                f"tensor {field.name!r} of shape {dims.tolist()} at offset {offset[0]} does not fit"
                f" into the file's {len(self.data)} bytes"
            )
        return field


_files: WeakValueDictionary[tuple[Any, ...], GGUFFile] = WeakValueDictionary()


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Returns the parsed file. As long as that is in use, a file that has not changed is not parsed
    again. Raises ValueError for a malformed file."""
    status = os.stat(path)
    key = os.fspath(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    file = _files.get(key)
    if file is None:
        file = _files[key] = GGUFFile(path)
    return file


def read_rows(path: Path, tensor: ReaderTensor, start: int, stop: int) -> np.ndarray:
    """Returns rows `start` to `stop` - 1 of a tensor, dequantized to float32.

    Raises NotImplementedError if the package gguf cannot dequantize the tensor's type.
    """
    return dequantize(stored_rows(path, tensor, start, stop), tensor.tensor_type)


def stored_rows(path: Path, tensor: ReaderTensor, start: int, stop: int) -> np.ndarray:
    """Returns rows `start` to `stop` - 1 of a tensor as they are stored. A vector is one row.

    They are a view of the file. Writing to it does not change the file.
    """
    # Map the file in each call, because unmapping releases the memory pages that were read.
    stored = np.memmap(path, tensor.data.dtype, "c", tensor.data_offset, tensor.data.shape)
    return np.atleast_2d(stored)[start:stop]
