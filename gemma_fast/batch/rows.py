"""Reads rows from JSON Lines or Parquet, one after another: memory does not grow with the file.

A row is a dict of columns. A column that is null is not set. A line that is not a JSON object gives
its error instead of a row; rows are numbered from 0, and blank lines are no rows.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

Row = dict[str, Any]
MAX_LINE = 64 << 20  # bytes
MAX_DEPTH = 100  # of lists and objects in each other
_PART = 1 << 20
_BOM = b"\xef\xbb\xbf"


class Numbered(NamedTuple):
    """A row with its number, or the error in its place.

    file  None: the input is one file
    """

    number: int
    row: Row | ValueError
    file: str | None = None


def read_rows(file: BinaryIO, name: str) -> Iterator[Row | ValueError]:
    """Yields each row of an open file, or the error of a malformed one. The suffix of `name` gives
    the format; raises ValueError for another one."""
    return _reader(name)(file)


def count_rows(path: Path) -> int:
    """Returns the number of rows, malformed ones included."""
    if _reader(path.name) is _parquet_rows:
        try:
            return _parquet_file(path).metadata.num_rows
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} cannot be read as Parquet: {error}") from error
    with path.open("rb") as file:
        return sum(1 for _ in _lines(file))


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_PART):
            digest.update(part)
    return digest.hexdigest()


def parse_line(line: bytes) -> Row | ValueError:
    """Returns the row of a line of JSON, or its error."""
    if len(line) > MAX_LINE:
        return ValueError(f"the line has more than {MAX_LINE >> 20} MiB: split or shorten it")
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
        deep = line.count(b"[") + line.count(b"{") > MAX_DEPTH and _is_deep(row)
    except ValueError as error:
        return ValueError(f"the line is not JSON: {error}")
    except RecursionError:
        deep = True
    if deep:
        return ValueError(f"the line is nested more than {MAX_DEPTH} deep")
    if not isinstance(row, dict):
        return ValueError(
            f'the line is not a row but {row!r:.60}: write an object, as {{"prompt": "Hello"}}'
        )
    return {name: value for name, value in row.items() if value is not None}


def _reader(name: str) -> Callable[[BinaryIO], Iterator[Row | ValueError]]:
    suffix = Path(name).suffix
    if suffix not in READERS:
        raise ValueError(f"{name}: the rows must be in a file {' or '.join(READERS)}")
    return READERS[suffix]


def _json_rows(file: BinaryIO) -> Iterator[Row | ValueError]:
    return map(parse_line, _lines(file))


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yields each line that is not blank, without its end; of a line above MAX_LINE, its first
    MAX_LINE + 1 bytes."""
    first = True
    while line := file.readline(MAX_LINE + 1):
        rest = line
        while len(line) > MAX_LINE and rest and not rest.endswith(b"\n"):
            rest = file.readline(_PART)
        line = line.removeprefix(_BOM) if first else line
        first = False
        if line := line.strip():
            yield line


def _parquet_rows(file: BinaryIO) -> Iterator[Row | ValueError]:
    for batch in _parquet_file(file).iter_batches(batch_size=64):
        for row in batch.to_pylist():
            yield {name: value for name, value in row.items() if not _is_missing(value)}


def _parquet_file(file: BinaryIO | Path) -> Any:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'Parquet needs pyarrow ({error}): pip install ".[parquet]"'
        ) from error
    return parquet.ParquetFile(file)


def _is_missing(value: Any) -> bool:
    """True for null, and for NaN, which pandas writes for null."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_deep(row: Any) -> bool:
    level = [row]
    for _ in range(MAX_DEPTH):
        level = [inner for value in level for inner in _items(value)]
    return bool(level)


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not allowed, write null")


READERS = {".jsonl": _json_rows, ".ndjson": _json_rows, ".parquet": _parquet_rows}
