"""Runs an HTTP application in a thread, for tests that send requests to it."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import openai
import uvicorn
from fastapi import FastAPI

from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.server.app import create_app
from gemma_fast.server.engine import Engine
from gemma_fast.text.tokenizer import Tokenizer

JSON = {"Content-Type": "application/json"}
# A completion of 200 tokens.
LONG = {"model": "tiny", "prompt": "hello", "max_tokens": 200, "logit_bias": {"1": -100}}


class Running:
    """A server. url without /v1; engine of its application"""

    def __init__(self, url: str, engine: Engine) -> None:
        self.url, self.engine = url, engine

    def client(self, **options) -> openai.OpenAI:
        options = {"api_key": "none", "max_retries": 0, "timeout": 120, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def async_client(self, **options) -> openai.AsyncOpenAI:
        options = {"api_key": "none", "max_retries": 0, "timeout": 120, **options}
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", **options)

    def wait_until_idle(self, seconds: float = 20) -> None:
        """Waits until no text has a row or waits, and no request has a place."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            scheduler = self.engine.scheduler
            if not (scheduler.running or scheduler.waiting or self.engine.taken):
                return
            time.sleep(0.01)
        raise AssertionError(
            f"{scheduler.running} running, {scheduler.waiting} waiting, {self.engine.taken} taken"
        )


@contextmanager
def running(
    model: GemmaForCausalLM, tokenizer: Tokenizer, *, engine: dict | None = None, **options
) -> Iterator[Running]:
    """Runs a server with these options of Engine and of create_app."""
    made = Engine(model, tokenizer, **{"batch_size": 4, "max_length": 256, **(engine or {})})
    with serving(create_app(made, "tiny", **options), made) as server:
        yield server


@contextmanager
def serving(app: FastAPI, engine: Engine) -> Iterator[Running]:
    """Runs the application of an engine."""
    config = uvicorn.Config(app, http="h11", ws="none", log_level="error", lifespan="on")
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", engine)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"


def error_of(content: bytes) -> dict:
    """Returns the error in a body, which must have OpenAI's shape."""
    error = json.loads(content)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def post(server, path: str, content, **headers) -> httpx.Response:
    """Sends a body as it is."""
    return httpx.post(
        f"{server.url}/v1/{path}", content=content, headers={**JSON, **headers}, timeout=60
    )


def check(response: httpx.Response, status: int, message: str, param: str | None = None) -> None:
    """Checks an error, which must be short."""
    error = error_of(response.content)
    assert (response.status_code, error["param"]) == (status, param), error
    assert message in error["message"]
    assert len(error["message"]) < 400


@contextmanager
def slow_steps(server, seconds: float = 0.02):
    """Makes each step take longer, so that texts run while the test does something."""
    scheduler = server.engine.scheduler
    step = scheduler.step

    def slow():
        time.sleep(seconds)
        return step()

    scheduler.step = slow
    try:
        yield
    finally:
        del scheduler.step


def wait_for(condition, seconds: float = 20) -> None:
    """Waits until a function returns True."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
