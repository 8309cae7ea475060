"""Tests `gemma-fast batch`: resuming after kill -9, two jobs, Ctrl-C, and its messages."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from gemma_fast.batch.answers import AnswerFile
from gemma_fast.cli import loading
from gemma_fast.cli.commands import main

ROOT = Path(__file__).parents[2]


def arguments(checkpoint: Path, source: Path, *more: str) -> list[str]:
    out = source.with_name("answers.jsonl")
    options = ["--out", str(out), "--model", str(checkpoint), "--device", "cpu", *more]
    return ["batch", str(source), *options]


def batch(checkpoint: Path, source: Path, *more: str):
    return CliRunner().invoke(main, arguments(checkpoint, source, *more))


def answers(source: Path) -> list[dict]:
    lines = source.with_name("answers.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(autouse=True)
def load_once(monkeypatch, model, tokenizer) -> list:
    """Replaces loading by the model of the other tests. Returns the arguments of each call."""
    calls: list = []

    def load(*args):
        calls.append(args)
        return model, tokenizer

    monkeypatch.setattr(loading, "load", load)
    return calls


def test_a_file_of_prompts_becomes_a_file_of_answers(checkpoint, write_rows, load_once):
    source = write_rows([{"prompt": "hello"}, "oops", {"prompt": "the", "max_new_tokens": 2}])
    result = batch(checkpoint, source, "-n", "4", "--temperature", "0.5", "--seed", "3")
    assert result.exit_code == 0, result.output
    assert "3 rows are done, 1 with an error: " in result.stderr
    assert "3/3" in result.stderr and "tokens/s" in result.stderr
    assert not result.stdout
    found = {x["row"]: x for x in answers(source)}
    assert [found[row].get("new_tokens") for row in range(3)] == [4, None, 2]
    record = json.loads(source.with_name("answers.jsonl.job.json").read_text())
    assert record["options"] == {"max_new_tokens": 4, "temperature": 0.5, "do_sample": True}
    assert record["seed"] == 3

    again = batch(checkpoint, source, "-n", "4", "--temperature", "0.5", "--seed", "3")
    assert again.exit_code == 0 and len(load_once) == 1  # nothing is left to do
    assert len(answers(source)) == 3


def test_rows_of_a_killed_job_are_not_done_again(checkpoint, write_rows):
    rows = [{"prompt": f"hello {i}"} for i in range(300)]
    source = write_rows(rows)
    out = source.with_name("answers.jsonl")
    options = arguments(checkpoint, source, "-n", "30", "--batch-size", "4")
    job = subprocess.Popen(
        [sys.executable, "-m", "gemma_fast", *options], cwd=ROOT, stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        while job.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") > 5):
            time.sleep(0.01)
        refused = batch(checkpoint, source, "-n", "30", "--batch-size", "4")
    finally:
        job.kill()
        job.wait()
    assert refused.exit_code == 1 and "another job writes" in refused.stderr
    before = out.read_bytes()
    done = before.count(b"\n")
    assert 5 < done < 300
    whole = before[: before.rfind(b"\n") + 1]
    out.write_bytes(whole + b'{"row": 299, "te')  # as if the machine had stopped while writing

    resumed = batch(checkpoint, source, "-n", "30", "--batch-size", "8")
    assert resumed.exit_code == 0, resumed.output
    assert "300 rows are done: " in resumed.stderr
    assert out.read_bytes().startswith(whole)
    found = sorted(answers(source), key=lambda x: x["row"])
    assert [x["row"] for x in found] == [*range(300)]
    anew = write_rows(rows, "anew.jsonl")
    out.rename(out.with_name("resumed.jsonl"))
    assert batch(checkpoint, anew, "-n", "30", "--batch-size", "4").exit_code == 0
    assert found == sorted(answers(anew), key=lambda x: x["row"])


def test_another_job_with_the_same_output_is_refused(checkpoint, write_rows, load_once):
    source = write_rows([{"prompt": "hello"}])
    assert batch(checkpoint, source, "-n", "4").exit_code == 0
    result = batch(checkpoint, source, "-n", "5")
    assert result.exit_code == 1
    assert 'options: {"max_new_tokens": 4}, now {"max_new_tokens": 5}' in result.stderr
    result = batch(checkpoint, source, "-n", "4", "--score")
    assert "score: false, now true" in result.stderr
    write_rows([{"prompt": "the"}])
    assert "input_sha256: " in batch(checkpoint, source, "-n", "4").stderr
    assert len(load_once) == 1  # refused before the model is loaded


def test_ctrl_c_says_how_many_rows_are_done(checkpoint, write_rows, monkeypatch):
    write = AnswerFile.write

    def interrupted(self, answer):
        write(self, answer)
        if self.done.count == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(AnswerFile, "write", interrupted)
    source = write_rows([{"prompt": "hello"}] * 5)
    result = batch(checkpoint, source, "-n", "4", "--batch-size", "1")
    assert result.exit_code == 130
    assert "Stopped: 2 of 5 rows are done. The same command goes on." in result.stderr
    monkeypatch.undo()
    assert len(answers(source)) == 2


def test_score_writes_logprobs(checkpoint, write_rows):
    source = write_rows([{"text": "hello"}, {"prompt": "hello", "completion": " the"}])
    result = batch(checkpoint, source, "--score")
    assert result.exit_code == 0, result.output
    assert all(x["logprob"] < 0 and x["tokens"] >= 1 for x in answers(source))


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("prompts.txt", (), "prompts.txt: the rows must be in a file .jsonl"),
        ("missing.jsonl", (), "No such file"),
        ("answers.jsonl", (), "answers.jsonl is the input"),
        ("prompts.jsonl", ("--workers", "2"), "it needs --ray"),
        ("prompts.jsonl", ("--batch-size", "0"), "0 is not in the range"),
    ],
)
def test_bad_call_is_refused(checkpoint, write_rows, name, more, message):
    source = write_rows([{"prompt": "hello"}], name)
    if name == "missing.jsonl":
        source.unlink()
    result = batch(checkpoint, source, *more)
    assert result.exit_code in (1, 2) and message in result.stderr, result.output
    assert isinstance(result.exception, SystemExit)


def test_interrupt_signal_ends_the_process_with_a_message(checkpoint, write_rows):
    source = write_rows([{"prompt": f"hello {i}"} for i in range(500)])
    out = source.with_name("answers.jsonl")
    job = subprocess.Popen(
        [sys.executable, "-m", "gemma_fast", *arguments(checkpoint, source, "-n", "30")],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while job.poll() is None and not (out.exists() and out.stat().st_size):
        time.sleep(0.01)
    job.send_signal(signal.SIGINT)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 130
    assert f"Stopped: {len(answers(source))} of 500 rows are done." in said
    assert "Traceback" not in said
