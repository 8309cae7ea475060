"""Tests `gemma-fast serve` in a process of its own."""

import functools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
from chat_checkpoint import write_chat_checkpoint
from click.testing import CliRunner

from gemma_fast.cli.commands import main
from gemma_fast.server.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
LONG = {"prompt": "hello", "max_tokens": 200, "logit_bias": {"1": -100}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_chat_checkpoint(tmp_path_factory.mktemp("tiny") / "gemma-tiny-it")


@contextmanager
def command(checkpoint: Path, *args: str, **environment: str):
    """Runs the command. Yields the process and its address."""
    base = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "GEMMA_FAST_API_KEY")
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "gemma_fast", "serve", "--model", str(checkpoint), "--port", "0",
         "--device", "cpu", *args],
        cwd=ROOT, env={**base, "PYTHONPATH": str(ROOT), **environment}, text=True,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        said = ""
        for line in process.stderr:
            said += line
            if found := re.search(r"Listening on (http://\S+)", said):
                process.said = said + process.stderr.readline()
                yield process, found[1]
                break
        else:
            pytest.fail(said)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_what_runs(checkpoint, number):
    with command(checkpoint, "--max-length", "256") as (process, url):
        with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(number)
            rest = [line for line in lines if line.startswith("data")]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason": "length"' in rest[-2]
        assert process.wait(10) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


def test_text_that_takes_longer_than_the_drain_ends_with_an_error(checkpoint):
    with command(checkpoint, "--drain", "0", "--batch-size", "1") as (process, url):
        post = functools.partial(httpx.post, f"{url}/v1/completions", timeout=30)
        with (
            ThreadPoolExecutor() as pool,
            httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "n": 9, "stream": True}) as
            answer,
        ):  # fmt: skip
            lines = answer.iter_lines()
            next(lines)
            waiting = pool.submit(post, json=LONG)
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
            assert rest[-1] == "data: [DONE]"
            assert "the server shuts down" in rest[-2]
            assert waiting.result().status_code == 503
            assert "the server shuts down" in waiting.result().json()["error"]["message"]
        assert process.wait(10) == 0
        assert "Traceback" not in process.stderr.read()


def test_name_key_and_address(checkpoint, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("\n first \nsecond\n")
    with command(checkpoint, "--api-key-file", str(keys), GEMMA_FAST_API_KEY="third") as (
        process,
        url,
    ):
        assert "curl" in process.said and "Bearer KEY" in process.said
        assert "first" not in process.said and url.startswith("http://127.0.0.1:")
        for key in ("first", "second"):
            client = openai.OpenAI(base_url=f"{url}/v1", api_key=key)
            assert [model.id for model in client.models.list()] == ["gemma-tiny-it"]
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="third").models.list()
        # With a key, a proxy may pass its own host name on.
        headers = {"Host": "example.com", "Authorization": "Bearer first"}
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200


def test_key_of_the_environment(checkpoint):
    with command(checkpoint, GEMMA_FAST_API_KEY="third") as (_, url):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        headers = {"Authorization": "Bearer third"}
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("key", ["", " \n"])
def test_empty_key_of_the_environment_is_refused(key, monkeypatch):
    monkeypatch.setenv("GEMMA_FAST_API_KEY", key)
    with pytest.raises(ValueError, match="GEMMA_FAST_API_KEY is empty: set it to an API key"):
        Settings().keys()


def test_keys_have_no_space_or_byte_order_mark(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_FAST_API_KEY", " a b\n")
    assert Settings().keys() == ["a b"]
    path = tmp_path / "keys"
    path.write_text("first\n second\n", encoding="utf-8-sig")
    assert Settings(api_key_file=str(path)).keys() == ["first", "second"]


def test_server_without_a_key_answers_to_local_names_only(checkpoint):
    with command(checkpoint) as (process, url):
        assert "Warning" not in process.said
        assert httpx.get(f"{url}/v1/models").status_code == 200
        assert httpx.get(f"{url}/v1/models", headers={"Host": "evil.example"}).status_code == 403


def test_open_address_without_a_key_is_warned_of(checkpoint):
    with command(checkpoint, "--host", "0.0.0.0") as (process, url):
        assert "Warning: everyone who reaches 0.0.0.0 can use the server" in process.said
        port = url.rpartition(":")[2]
        headers = {"Host": "example.com"}
        assert httpx.get(f"http://127.0.0.1:{port}/health", headers=headers).status_code == 200


def run(*args: str):
    return CliRunner().invoke(main, ["serve", *args])


def test_bad_options_are_refused_before_the_model_is_loaded(tmp_path):
    (tmp_path / "empty").write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for args, message in {
            ("--api-key-file", str(tmp_path / "empty")): "is empty: write an API key in each line",
            ("--api-key-file", str(tmp_path / "none")): "does not exist",
            ("--port", port): f"cannot listen on 127.0.0.1:{port}: Address already in use",
            ("--host", "nowhere.invalid"): "nowhere.invalid",
            ("--queue", "-1"): "-1 is not in the range",
            ("--max-time", "0"): "greater than 0",
        }.items():
            start = time.monotonic()
            result = run("--model", "/nowhere", *args)
            assert result.exit_code != 0
            assert message in result.output
            assert time.monotonic() - start < 5


def test_missing_extra_is_named(monkeypatch):
    for name in [x for x in sys.modules if x.startswith("gemma_fast.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    result = run()
    assert result.exit_code == 1
    assert 'pip install ".[serve]"' in result.output and "fastapi" in result.output


def test_names_of_models(checkpoint, tmp_path):
    file = tmp_path / "gemma-3-1b.Q4_K_M.gguf"
    file.touch()
    for model, name in {
        None: "demo",
        str(checkpoint): "gemma-tiny-it",
        f"{checkpoint}/": "gemma-tiny-it",
        str(file): "gemma-3-1b.Q4_K_M",
        "google/gemma-3-1b-it": "google/gemma-3-1b-it",
    }.items():
        assert Settings(model=model).name() == name
    assert Settings(model=str(file), served_name="mine").name() == "mine"


def test_settings_of_the_environment(monkeypatch):
    monkeypatch.setenv("GEMMA_FAST_BATCH_SIZE", "3")
    monkeypatch.setenv("GEMMA_FAST_BATCH_INVARIANT", "true")
    settings = Settings.from_environment(queue=5)
    assert (settings.batch_size, settings.batch_invariant, settings.queue) == (3, True, 5)
    monkeypatch.setenv("GEMMA_FAST_BATCH_SIZE", "x")
    with pytest.raises(ValueError, match="batch_size"):
        Settings.from_environment()
