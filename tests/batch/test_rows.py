"""Tests reading rows of JSON Lines and Parquet, and what malformed lines give."""

import datetime
import io
import math
from itertools import islice

import pytest

from gemma_fast.batch import rows as rows_module
from gemma_fast.batch.answers import as_line
from gemma_fast.batch.rows import MAX_DEPTH, count_rows, parse_line, read_rows, sha256


def read(content: bytes, name: str = "x.jsonl") -> list:
    return [*read_rows(io.BytesIO(content), name)]


def test_rows_are_objects_and_blank_lines_are_no_rows(tmp_path):
    content = b'\xef\xbb\xbf{"prompt": "a"}\n\n  \r\n{"prompt": "b", "top_k": null}\r\n{"id": 3}'
    assert read(content) == [{"prompt": "a"}, {"prompt": "b"}, {"id": 3}]
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    assert count_rows(path) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a"', "not JSON: Expecting ',' delimiter"),
        (b"prompt", "not JSON: Expecting value"),
        (b"[1, 2]", r"not a row but \[1, 2\]: write an object"),
        (b"null", "not a row but None: write an object"),
        (b'{"temperature": NaN}', "NaN is not allowed, write null"),
        (b'{"prompt": "\xff"}', "not JSON: 'utf-8' codec can't decode"),
        (b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}", "nested more than 100 deep"),
        (b'{"a": ' + b"[" * 100000, "nested more than 100 deep"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "Exceeds the limit"),
    ],
)
def test_malformed_line_is_an_error_and_the_next_row_is_read(line, message):
    error, row = read(line + b'\n{"prompt": "b"}\n')
    with pytest.raises(ValueError, match=message):
        raise error
    assert row == {"prompt": "b"}


def test_many_lists_beside_each_other_are_not_deep():
    assert parse_line(as_line({"a": [[]] * (2 * MAX_DEPTH)})) == {"a": [[]] * (2 * MAX_DEPTH)}


def test_line_without_an_end_does_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(rows_module, "MAX_LINE", 100)
    monkeypatch.setattr(rows_module, "_PART", 30)
    error, row = read(b'{"prompt": "' + b"a" * 500 + b'"}\n{"prompt": "b"}\n')
    assert "the line has more than" in str(error)
    assert row == {"prompt": "b"}


def test_rows_are_read_one_after_another():
    read_lines = []

    class Endless(io.RawIOBase):
        def readline(self, size=-1):
            read_lines.append(size)
            return b'{"prompt": "a"}\n'

    assert len([*islice(read_rows(Endless(), "x.jsonl"), 3)]) == 3
    assert len(read_lines) == 3


def test_parquet_has_the_rows_of_json_lines(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    chat = [{"role": "user", "content": "b"}]
    columns = {
        "prompt": ["a", None, "c"], "messages": [None, chat, None], "top_k": [3, None, None],
        "label": [[1, 2], [], None],
    }  # fmt: skip
    parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    lines = [as_line({k: v[i] for k, v in columns.items()}) for i in range(3)]
    with (tmp_path / "x.parquet").open("rb") as file:
        assert [*read_rows(file, "x.parquet")] == [*map(parse_line, lines)]
    assert count_rows(tmp_path / "x.parquet") == 3


def test_nan_and_dates_of_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    day = datetime.date(2026, 1, 2)
    table = pa.table({"prompt": ["a", "b"], "score": [math.nan, 1.5], "day": [day, None]})
    parquet.write_table(table, tmp_path / "x.parquet")
    with (tmp_path / "x.parquet").open("rb") as file:
        first, second = read_rows(file, "x.parquet")
    assert first == {"prompt": "a", "day": day}
    assert second == {"prompt": "b", "score": 1.5}
    assert as_line(first) == b'{"prompt": "a", "day": "2026-01-02"}\n'


def test_answers_are_json_without_infinities():
    """1e999 is an infinity for json.loads, and Parquet has infinities and NaN in lists."""
    row = parse_line(b'{"id": 1e999, "a": [{"b": -1e999}], "c": 1.5}')
    line = as_line({**row, "d": (math.nan,)})
    assert line == b'{"id": "inf", "a": [{"b": "-inf"}], "c": 1.5, "d": ["nan"]}\n'


@pytest.mark.parametrize("content", [b"", b"no Parquet"], ids=["empty", "other"])
def test_file_that_is_no_parquet_is_named(tmp_path, content):
    pytest.importorskip("pyarrow")
    path = tmp_path / "x.parquet"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.parquet cannot be read as Parquet: "):
        count_rows(path)


def test_another_suffix_is_refused():
    with pytest.raises(ValueError, match=r"x.txt: .* a file .jsonl or .ndjson or .parquet"):
        read(b"", "x.txt")


def test_sha256_of_a_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert sha256(path).startswith("ba7816bf8f01cfea414140de5dae2223")
