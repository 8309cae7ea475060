"""Tests jobs on Ray Data with one machine: two actors, a job that goes on, other formats."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from gemma_fast.batch.job import Job
from gemma_fast.batch.local import answers_of
from gemma_fast.batch.rows import Numbered, read_rows
from gemma_fast.cli.commands import main

ROOT = Path(__file__).parents[2]
# Runs a job whose actors append the ids of their processes to a file.
RUN = """
import os, sys
from gemma_fast.batch import ray_job
from gemma_fast.batch.job import Job

checkpoint, source, out, actors = sys.argv[1:]

class Actor(ray_job._Actor):
    def __init__(self, *args):
        super().__init__(*args)
        with open(actors, "a") as file:
            file.write(f"{os.getpid()}\\n")

ray_job._Actor = Actor
options = {"max_new_tokens": 100, "do_sample": True, "eos_token_id": []}
job = Job(model=checkpoint, device="cpu", options=options, seed=7, batch_size=2)
print(*ray_job.run_on_ray(job, source, out, workers=2))
"""
JOB = Job(
    model="", options={"max_new_tokens": 100, "do_sample": True, "eos_token_id": []}, seed=7
)  # fmt: skip


def start(checkpoint: Path, source: Path) -> subprocess.Popen:
    """Starts a job in a process of its own, without Triton's interpreter."""
    out, actors = source.with_name("out"), source.with_name("actors")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(checkpoint), str(source), str(out), str(actors)],
        cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def answers(out: Path) -> list[dict]:
    found = [json.loads(line) for file in out.iterdir() for line in file.open()]
    return sorted(found, key=lambda x: (x.get("file", ""), x.get("row", x.get("id"))))


@pytest.fixture
def source(tmp_path) -> Path:
    """Returns a folder with two files of rows, of which one is malformed."""
    pytest.importorskip("ray")
    folder = tmp_path / "prompts"
    folder.mkdir()
    rows = [{"prompt": f"hello {i}", "id": i, "mixed": [1, {"a": i}]} for i in range(20)]
    for name in ("a", "b"):
        lines = [*map(json.dumps, rows), "oops"]
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def local_answers(model, tokenizer, source: Path) -> list[dict]:
    found = []
    for path in sorted(source.iterdir()):
        with path.open("rb") as file:
            rows = [*enumerate(read_rows(file, path.name))]
        numbered = [Numbered(number, row, str(path)) for number, row in rows]
        found += sorted(answers_of(model, tokenizer, JOB, numbered), key=lambda x: x["row"])
    return found


@pytest.mark.slow
def test_two_actors_write_the_answers_of_a_job_on_one_machine(source, checkpoint, model, tokenizer):
    job = start(checkpoint, source)
    printed, said = job.communicate(timeout=300)
    assert job.returncode == 0, said
    assert printed == "42 2\n"
    assert len({*source.with_name("actors").read_text().split()}) == 2
    assert answers(source.with_name("out")) == local_answers(model, tokenizer, source)
    assert "usage stat" not in said.lower() and "dashboard" not in said.lower()

    again = start(checkpoint, source)
    _, said = again.communicate(timeout=300)
    assert again.returncode == 1
    assert "has all answers of this job" in said


@pytest.mark.slow
def test_rows_of_a_killed_job_are_not_done_again(source, checkpoint, model, tokenizer):
    out = source.with_name("out")
    job = start(checkpoint, source)
    while job.poll() is None and not (out.exists() and any(out.iterdir())):
        time.sleep(0.05)
    job.kill()
    job.communicate()
    done = {file.name: file.read_bytes() for file in out.iterdir()}
    resumed = start(checkpoint, source)
    printed, said = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, said
    assert 0 < int(printed.split()[0]) < 42
    kept = [name for name, content in done.items() if (out / name).read_bytes() == content]
    assert kept  # a file that was not finished is deleted
    assert answers(out) == local_answers(model, tokenizer, source)


@pytest.mark.slow
def test_formats_that_only_ray_reads(tmp_path, checkpoint, model, tokenizer):
    pytest.importorskip("ray")
    source = tmp_path / "prompts.csv"
    source.write_text("prompt,id,label\nhello the,1,a\nthe,2,b\n,3,c\n")
    job = start(checkpoint, source)
    printed, said = job.communicate(timeout=300)
    assert job.returncode == 0, said
    assert printed == "3 0\n"
    found = answers(source.with_name("out"))
    assert [(x["id"], x["columns"], x["new_tokens"]) for x in found] == [
        (1, {"label": "a"}, 100), (2, {"label": "b"}, 100), (3, {"label": "c"}, 100),
    ]  # fmt: skip


def test_folder_without_readable_files_is_refused(tmp_path):
    ray_job = pytest.importorskip("gemma_fast.batch.ray_job")
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "_ignored.txt").write_text("")
    assert ray_job._suffix(ray_job.Place.of(str(tmp_path)), "x") == ".jsonl"
    (tmp_path / "b.exe").write_text("")
    with pytest.raises(ValueError, match=r"x: found .exe, .jsonl: all files must have one of"):
        ray_job._suffix(ray_job.Place.of(str(tmp_path)), "x")
    with pytest.raises(ValueError, match="x: found no files"):
        ray_job._suffix(ray_job.Place.of(str(tmp_path / "nothing")), "x")


def test_folder_of_another_job_is_refused(tmp_path):
    ray_job = pytest.importorskip("gemma_fast.batch.ray_job")
    out = tmp_path / "deep" / "out"
    config = ray_job._prepare_folder(JOB, "prompts", str(out))
    assert config.checkpoint_path == f"{out}.checkpoint"
    out.mkdir()
    (out / "1.jsonl").write_text("{}\n")
    Path(f"{out}.checkpoint").mkdir()
    assert ray_job._prepare_folder(JOB, "prompts", str(out)).id_column == "key"
    with pytest.raises(ValueError, match='source: "prompts", now "others"'):
        ray_job._prepare_folder(JOB, "others", str(out))
    Path(f"{out}.checkpoint").rmdir()
    with pytest.raises(ValueError, match="has all answers of this job, or cannot go on"):
        ray_job._prepare_folder(JOB, "prompts", str(out))
    Path(f"{out}.job.json").unlink()
    with pytest.raises(ValueError, match="is not empty: pass another --out"):
        ray_job._prepare_folder(JOB, "prompts", str(out))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_source_numbers_the_rows_of_a_file(tmp_path, suffix):
    ray_job = pytest.importorskip("gemma_fast.batch.ray_job")
    from pyarrow import OSFile, parquet

    rows = [{"prompt": f"hello {i}", "label": [i]} for i in range(1100)]
    path = str(tmp_path / f"x{suffix}")
    if suffix == ".parquet":
        parquet.write_table(ray_job.pa.Table.from_pylist(rows), path)
    else:
        lines = [*map(json.dumps, rows), "oops"]
        Path(path).write_text("\n".join(lines))
    blocks = [*ray_job._RowSource._read_stream(None, OSFile(path), path)]
    assert len(blocks) == 2  # a block at a time, not the whole file
    found = [ray_job._numbered(row) for block in blocks for row in block.to_pylist()]
    assert found[:1100] == [Numbered(i, row, path) for i, row in enumerate(rows)]
    assert ["not JSON" in str(x.row) for x in found[1100:]] == [True] * (suffix == ".jsonl")


def test_missing_ray_is_an_error_with_its_command(monkeypatch, checkpoint, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "gemma_fast.batch.ray_job", raising=False)
    options = ["--out", str(tmp_path / "out"), "--model", str(checkpoint), "--ray", "local"]
    result = CliRunner().invoke(main, ["batch", str(tmp_path), *options])
    assert result.exit_code == 1
    assert "--ray needs Ray" in result.stderr and 'pip install ".[ray]"' in result.stderr


def test_model_that_does_not_exist_ends_the_job_before_ray_starts(write_rows, tmp_path):
    ray_job = pytest.importorskip("gemma_fast.batch.ray_job")
    source = write_rows([{"prompt": "a"}])
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        ray_job.run_on_ray(replace(JOB, model="nowhere"), str(source), str(tmp_path / "out"))
    assert not ray_job.ray.is_initialized() and [*tmp_path.iterdir()] == [source]


def test_columns_of_a_file_may_have_any_names():
    """Files that Ray reads have rows without numbers."""
    ray_job = pytest.importorskip("gemma_fast.batch.ray_job")
    row = {"prompt": "a", "key": "x", "line": "y"}
    assert ray_job._numbered(row).row == row
