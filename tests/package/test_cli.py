"""Tests the command line `gemma-fast`, mostly with the demo weights."""

import gc
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from chat_checkpoint import write_chat_checkpoint
from click.testing import CliRunner
from demo_answers import CONTINUATION, TOP_TEN
from marks import slow

from gemma_fast.cli import loading
from gemma_fast.cli.commands import main


def run(*args: str, **kwargs):
    return CliRunner().invoke(main, args, **kwargs)


@pytest.fixture(scope="module", autouse=True)
def load_once():
    """Loads a model once per combination of options. Defaults to the CPU."""
    load = cache(loading.load)
    with pytest.MonkeyPatch.context() as patch:

        def on_cpu(model, device, dtype, quantize):
            return load(model, device or "cpu", dtype, quantize)

        on_cpu.cache_clear = load.cache_clear  # type: ignore[attr-defined]
        patch.setattr(loading, "load", on_cpu)
        yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def packed_demo(demo_gguf) -> tuple[str, ...]:
    return "--model", str(demo_gguf), "--device", "cpu"


@pytest.fixture(scope="module")
def demo(packed_demo) -> tuple[str, ...]:
    """Returns options with which the demo's text is that of transformers in float32."""
    return *packed_demo, "--dtype", "float32", "--quantize", "none"


def test_predict_prints_the_top_ten(demo):
    result = run("predict", "I want to move", *demo)
    assert result.exit_code == 0, result.output
    text = result.stdout
    for token, probability in TOP_TEN.items():
        assert f"{token!r} {probability:.4f}" in text


def test_predict_prints_json(demo):
    result = run("predict", "I want to move", "--top", "3", "--json", *demo)
    rows = json.loads(result.stdout)
    assert [row["token"] for row in rows] == ["<bos>", "I", " want", " to", " move"]
    assert [x["token"] for x in rows[-1]["next"]] == [" to", " my", " the"]
    assert rows[-1]["next"][0]["probability"] == pytest.approx(0.1956, abs=5e-4)
    assert rows[-1]["id"] == 2827


def test_generate_streams_text_and_reports_its_speed(demo):
    result = run("generate", "I want to move", "-n", "30", *demo)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"I want to move{CONTINUATION}\n"
    assert "5 prompt tokens at " in result.stderr
    assert "30 new tokens at " in result.stderr
    assert "first token after " in result.stderr
    assert "peak memory " in result.stderr and "GB (weights 1.07, cache 0.0" in result.stderr


def test_demo_stays_packed_by_default(packed_demo):
    result = run("generate", "I want to move", "-n", "5", *packed_demo)
    assert result.exit_code == 0, result.output
    assert result.stdout == "I want to move to a new country,\n"
    assert "GB (weights 0.28, cache 0.0" in result.stderr


def test_generate_prints_json(demo):
    args = ("generate", "I want to move", "-n", "4", "--json", *demo)
    result = json.loads(run(*args).stdout)
    assert result["text"] == " to a new country"
    assert result["new_tokens"] == 4
    assert result["decode_tokens_per_s"] > 0
    assert result["memory_bytes"].keys() == {"weights", "cache", "graph"}
    drawn = [json.loads(run(*args, "--top-k", "50", "--seed", s).stdout)["ids"] for s in "334"]
    assert drawn[0] == drawn[1] != drawn[2]


def test_generate_stops_at_a_stop_string(demo):
    result = run("generate", "I want to move", "-n", "30", "--stop", "country", *demo)
    assert result.stdout == "I want to move to a new country\n"


def test_chat_keeps_the_conversation(demo):
    result = run("chat", "-n", "3", *demo, input="Hello\nAnd you?\n")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("new tokens") == 2
    first, second = (
        int(line.split(" prompt tokens")[0].split()[-1])
        for line in result.stderr.splitlines()
        if "prompt tokens" in line
    )
    assert second > first + 6


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("generate", "a", "--model", "/nowhere"), "/nowhere does not exist"),
        (("generate", "a", "--model", "weights.bin"), "pickle"),
        (("predict", "a", "--top", "0"), "0 is not in the range"),
        (("generate", "a", "--dtype", "int8"), "'int8' is not one of"),
        (("generate", "a", "--quantize", "int5"), "'int5' is not one of 'int8', 'int4', 'none'"),
        *slow(
            (("generate", "a", "--device", "abacus"), "device 'abacus' is unknown"),
            (("generate", "a", "--dtype", "float16"), "overflows float16"),
        ),
        (("generate", "a", "-n", "0"), "max_new_tokens=0 must be"),
        (("generate", "a", "-n", "40000"), "do not fit the model's context of 32768"),
        (("generate", "a", "--temperature", "-1"), "temperature=-1.0 is out of range"),
        (("write", "a"), "No such command 'write'"),
        (("bench", "-p", "8,x"), "'x' is not a whole number"),
        (("bench", "-b", "0"), "0 is less than 1"),
        (("bench", "--only", "vllm"), "no provider vllm: choose from eager, transformers"),
        (("bench", "-d", "40000"), "no test fits the context of"),
    ],
    ids=str,
)
def test_errors_print_a_message_without_a_traceback(demo, args, message):
    with_model = args if "--model" in args else (*args, *demo[:2])
    result = run(*with_model)
    assert result.exit_code != 0
    assert message in result.output
    assert "Traceback" not in result.output


def test_error_without_demo_weights_names_the_extra(monkeypatch):
    monkeypatch.setattr("gemma_fast.demo.PARTS", {"a_package_that_is_not_there": "x"})
    monkeypatch.setenv("XDG_CACHE_HOME", "/nonexistent")
    result = run("predict", "a")
    assert result.exit_code == 1
    assert 'pip install "gemma_fast[demo]"' in result.output


@pytest.mark.parametrize(
    "option", [("--temperature", "2"), ("--top-p", "0.99"), ("--min-p", "1e-4")], ids=str
)
def test_each_sampling_option_switches_sampling_on(demo, option):
    args = ("generate", "I want to move", "-n", "8", "--json", "--seed", "1", *demo)
    greedy, drawn, kept = (
        json.loads(run(*args, *more).stdout)["ids"] for more in ((), option, (*option, "--greedy"))
    )
    assert drawn != greedy == kept


@pytest.mark.parametrize("more", [(), ("--greedy",), ("--sample",), ("--top-k", "9")], ids=str)
def test_temperature_0_is_greedy(demo, more):
    args = ("generate", "I want to move", "-n", "8", "--json", *demo)
    greedy, given = (json.loads(run(*args, *x).stdout) for x in ((), ("--temperature", "0", *more)))
    assert given["ids"] == greedy["ids"]


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return write_chat_checkpoint(tmp_path)


def test_the_checkpoint_says_where_a_text_ends(checkpoint):
    """generation_config.json may have end tokens, stop strings and other options."""

    def write(*more: str, **fields) -> str:
        (checkpoint / "generation_config.json").write_text(json.dumps(fields))
        args = ("generate", "hello a", "-n", "9", "--json", "--model", str(checkpoint))
        loading.load.cache_clear()
        result = run(*args, *more)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    free = write()
    assert len(free["ids"]) == 9
    token = free["ids"][5]
    end = free["ids"].index(token) + 1
    assert write(eos_token_id=[1, token])["ids"] == free["ids"][:end]
    longer = write(eos_token_id=[token], min_new_tokens=9)["ids"]
    assert len(longer) == 9 and token not in longer
    assert token not in write(suppress_tokens=[token])["ids"]
    letter = free["text"].strip()[0]
    stopped = write(stop_strings=[letter])
    assert letter in stopped["text"] and len(stopped["ids"]) < 9
    assert write("--stop", "never", stop_strings=[letter])["ids"] == free["ids"]
    assert write(num_return_sequences=2, return_dict_in_generate=True)["ids"] == free["ids"]


def test_command_runs_as_a_module():
    command = [sys.executable, "-m", "gemma_fast", "--help"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("Usage: gemma-fast [OPTIONS] COMMAND")
