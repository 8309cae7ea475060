"""`AnswerFile` is the output of a job: one whole line of JSON for each row that is done.

A job that was killed goes on: it removes a torn last line, and skips the rows that have a line.
`answers.jsonl.job.json` beside the file says which job writes it; another job is refused. So is a
second process, by a lock that ends with the process that holds it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

Answer = dict[str, Any]
_LOCK_AT = 1 << 62  # on Windows, a byte far behind the end is locked, and readers go on


class Rows:
    """A set of row numbers, with one bit for each number up to the highest."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self.count = 0

    def add(self, row: int) -> None:
        place, bit = divmod(row, 8)
        self._bits.extend(bytes(max(place + 1 - len(self._bits), 0)))
        self.count += row not in self
        self._bits[place] |= 1 << bit

    def __contains__(self, row: int) -> bool:
        place, bit = divmod(row, 8)
        return place < len(self._bits) and bool(self._bits[place] >> bit & 1)


class AnswerFile:
    """Appends answers to a file.

    path    of the answers; its folder must exist
    record  what the answers depend on, plain JSON: a job with another record is refused

    done    the rows that have an answer
    errors  number of answers that are errors

    Raises ValueError if another process writes the file, if another job wrote it, or if the file
    has a line that is no answer.
    """

    def __init__(self, path: Path, record: Mapping[str, Any]) -> None:
        self.path, self.done, self.errors = path, Rows(), 0
        self._file: BinaryIO = path.open("ab+", buffering=0)
        try:
            _lock(self._file, path)
            self._check_record(record)
            self._size = self._read_done()
            self._file.truncate(self._size)
        except BaseException:
            self._file.close()
            raise

    def write(self, answer: Answer) -> None:
        """Appends the answer of a row. If it fails, for example because the disk is full, the file
        ends in a whole line, and the error says how many rows are done."""
        line = as_line(answer)
        try:
            left = memoryview(line)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._file.truncate(self._size)
            raise OSError(error.errno, self._failure(error)) from error
        self._size += len(line)
        self._count(answer)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _failure(self, error: OSError) -> str:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        way_out = f"{'free some space, and ' if full else ''}repeat the command, which goes on"
        reason = os.strerror(error.errno or 0)
        return f"{self.path}: {reason}; {self.done.count} rows are done: {way_out}"

    def _count(self, answer: Mapping[str, Any]) -> None:
        self.done.add(answer["row"])
        self.errors += "error" in answer

    def _check_record(self, record: Mapping[str, Any]) -> None:
        """Compares the record with that of the job that began the file; writes it if the file is
        empty."""
        side = self.path.with_name(f"{self.path.name}.job.json")
        empty = self.path.stat().st_size == 0
        if empty:
            part = side.with_name(f"{side.name}.part")
            part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            part.replace(side)
            return
        try:
            begun = json.loads(side.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.path} exists, and {side.name}, which says how it was made, cannot be read"
                f" ({error}): pass another --out"
            ) from error
        check_record(begun, record, str(self.path))

    def _read_done(self) -> int:
        """Finds the rows that are done. Returns the size of the file without a torn last line."""
        size = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    self._count(json.loads(line))
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{self.path}, line {number} is not an answer ({error!r:.80}): remove the"
                        " line, and its row is done again"
                    ) from error
                size += len(line)
        return size


def check_record(begun: Any, record: Mapping[str, Any], out: str) -> None:
    """Raises ValueError if `begun`, the record of the job that began `out`, is another record."""
    begun = begun if isinstance(begun, dict) else {}
    names = {**record, **begun}
    changed = [
        f"{name}: {json.dumps(begun.get(name)):.80}, now {json.dumps(record.get(name)):.80}"
        for name in names
        if record.get(name) != begun.get(name)
    ]
    if changed:
        raise ValueError(
            f"{out} has answers of another job ({'; '.join(changed)}): repeat that job's command,"
            " or pass another --out"
        )


def as_line(answer: Answer) -> bytes:
    """Returns an answer as a line of JSON. Values that JSON does not have, for example dates and
    infinities of a Parquet file, become their str."""
    answer = _without_infinities(answer)
    text = json.dumps(answer, ensure_ascii=False, default=str)
    try:
        return f"{text}\n".encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return (json.dumps(answer, default=str) + "\n").encode()


def _without_infinities(value: Any) -> Any:
    """Returns the value with the str of each float that is infinite or NaN in place of it."""
    if isinstance(value, dict):
        return {name: _without_infinities(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(_LOCK_AT)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise
        raise ValueError(
            f"another job writes {path} now: wait for it, or pass another --out"
        ) from None
