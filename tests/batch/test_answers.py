"""Tests the file of answers: whole lines, resuming, locks, full disks, records of other jobs."""

import json
import resource

import pytest

from gemma_fast.batch.answers import AnswerFile, Rows, as_line

RECORD = {"model": "m", "options": {"top_k": 3}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "answers.jsonl"


def written(path, *rows: int) -> list[bytes]:
    with AnswerFile(path, RECORD) as file:
        for row in rows:
            file.write({"row": row, "text": f"é {row}"})
    return path.read_bytes().splitlines(keepends=True)


def test_rows_of_whole_lines_are_done(path):
    assert written(path, 5, 0, 11)[0] == '{"row": 5, "text": "é 5"}\n'.encode()
    with AnswerFile(path, RECORD) as file:
        assert [row for row in range(40) if row in file.done] == [0, 5, 11]
        assert (file.done.count, file.errors) == (3, 0)


def test_torn_last_line_is_removed_and_its_row_is_not_done(path):
    lines = written(path, 5, 0, 11)
    path.write_bytes(b"".join(lines)[:-4])
    with AnswerFile(path, RECORD) as file:
        assert 11 not in file.done
        assert file.done.count == 2
        file.write({"row": 3, "error": "no"})
    assert path.read_bytes() == b"".join(lines[:2]) + b'{"row": 3, "error": "no"}\n'


def test_set_of_rows_counts_each_once():
    rows = Rows()
    for row in (3, 900, 3, 8, 7):
        rows.add(row)
    assert rows.count == 4
    assert [row for row in range(1000) if row in rows] == [3, 7, 8, 900]
    assert 10**9 not in rows


def test_second_job_is_refused_while_the_first_writes(path):
    with AnswerFile(path, RECORD) as file:
        file.write({"row": 0, "text": ""})
        with pytest.raises(ValueError, match=r"another job writes .*answers.jsonl now"):
            AnswerFile(path, RECORD)
        file.write({"row": 1, "text": ""})
    assert len(written(path, 2)) == 3


def test_full_disk_leaves_whole_lines_and_the_job_can_go_on(path):
    lines = written(path, 0, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with AnswerFile(path, RECORD) as file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 9, hard))
        try:
            with pytest.raises(OSError, match="2 rows are done: free some space, and repeat"):
                file.write({"row": 2, "text": "longer than nine bytes"})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == b"".join(lines)
        assert 2 not in file.done
    assert [json.loads(line)["row"] for line in written(path, 2)] == [0, 1, 2]


def test_another_job_is_refused_with_what_differs(path):
    written(path, 0)
    with pytest.raises(ValueError, match=r'options: {"top_k": 3}, now {"top_k": 4}\)'):
        AnswerFile(path, {**RECORD, "options": {"top_k": 4}})
    with pytest.raises(ValueError, match="score: null, now true"):
        AnswerFile(path, {**RECORD, "score": True})
    assert len(written(path, 1)) == 2


def test_file_without_a_record_is_refused_and_kept(path):
    path.write_text("important\n")
    with pytest.raises(ValueError, match=r"exists, and answers.jsonl.job.json.* cannot be read"):
        AnswerFile(path, RECORD)
    assert path.read_text() == "important\n"


def test_empty_file_begins_anew_with_another_record(path):
    written(path, 0)
    path.write_text("")
    with AnswerFile(path, {"model": "other"}) as file:
        assert file.done.count == 0
    assert json.loads(path.with_name("answers.jsonl.job.json").read_text()) == {"model": "other"}


def test_damaged_line_is_named(path):
    lines = written(path, 0, 1)
    path.write_bytes(lines[0] + b'{"no": 1}\n' + lines[1])
    with pytest.raises(ValueError, match=r"line 2 is not an answer .*: remove the line"):
        AnswerFile(path, RECORD)


def test_half_of_a_surrogate_pair_can_be_written():
    assert json.loads(as_line({"a": "\ud800é"})) == {"a": "\ud800é"}
