"""Tests that an error of one text, step or request leaves the server to the others, and that
clients learn nothing of its inside."""

import httpx
import openai
import pytest
import torch
from http_server import LONG, error_of, running, slow_steps, wait_for

from gemma_fast.engine.scheduler import Scheduler
from gemma_fast.server.metrics import Metrics


def fail_once(monkeypatch, error: Exception) -> None:
    step, failed = Scheduler.step, []

    def failing(self):
        if not failed and self.running:
            failed.append(True)
            raise error
        return step(self)

    monkeypatch.setattr(Scheduler, "step", failing)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "error", [RuntimeError("secret"), ValueError("secret"), KeyError("secret")]
)
def test_failed_step_ends_its_texts_and_the_server_goes_on(
    server, client, monkeypatch, stream, error
):
    expected = client.completions.create(**LONG, temperature=0).choices[0].text
    fail_once(monkeypatch, error)
    before = server.engine.scheduler
    with pytest.raises(openai.APIError, match="internal error") as found:
        for _ in client.completions.create(**LONG, stream=stream):
            pass
    wait_for(lambda: server.engine.scheduler is not before)
    assert "secret" not in str(found.value)
    if not stream:
        assert isinstance(found.value, openai.InternalServerError)
    server.wait_until_idle()
    assert client.completions.create(**LONG, temperature=0).choices[0].text == expected


def test_failed_cancellation_does_not_stop_the_server(server, client, monkeypatch):
    def fail(self, text):
        monkeypatch.undo()
        raise RuntimeError("secret")

    with slow_steps(server):
        stream = client.completions.create(**LONG, stream=True)
        next(stream)
        monkeypatch.setattr(Scheduler, "cancel", fail)
        stream.close()
        wait_for(lambda: not server.engine.scheduler)
    assert client.completions.create(**LONG).usage.completion_tokens == 200
    server.wait_until_idle()


def test_text_with_logits_that_are_not_finite_ends_alone(server, client, monkeypatch):
    """The logits of one row are NaN from its fifth token on."""
    sampler = server.engine._decoder.sampler
    process, calls = type(sampler)._process, []

    def broken(self, logits):
        calls.append(len(logits))
        if len(calls) > 5:
            logits = logits.clone()
            logits[0] = torch.nan
        return process(self, logits)

    with slow_steps(server):
        other = client.completions.create(**LONG, stream=True)
        with monkeypatch.context() as patch:
            patch.setattr(type(sampler), "_process", broken)
            with pytest.raises(openai.APIError, match="internal error"):
                list(other)
    server.wait_until_idle()
    assert client.completions.create(**LONG, temperature=0).usage.completion_tokens == 200


def test_error_of_the_application_is_answered_and_counted(server, monkeypatch):
    def fail(self):
        raise RuntimeError("secret")

    monkeypatch.setattr(Metrics, "page", fail)
    response = httpx.get(f"{server.url}/metrics")
    monkeypatch.undo()
    assert response.status_code == 500
    assert error_of(response.content)["message"].startswith("internal error")
    page = httpx.get(f"{server.url}/metrics").text
    assert 'gemma_fast_responses_total{path="/metrics",status="500"} 1.0' in page


def test_engine_that_cannot_go_on_says_so(tiny, monkeypatch):
    with running(*tiny) as server:
        client = server.client()
        fail_once(monkeypatch, RuntimeError("secret"))
        server.engine._open = lambda: 1 / 0
        with pytest.raises(openai.InternalServerError):
            client.completions.create(**LONG)
        response = httpx.get(f"{server.url}/health")
        assert response.status_code == 503
        assert "must be restarted" in error_of(response.content)["message"]
        with pytest.raises(openai.InternalServerError, match="must be restarted"):
            client.completions.create(**LONG)


def test_texts_end_when_the_server_closes(tiny):
    with running(*tiny) as server:
        with slow_steps(server):
            stream = server.client().completions.create(**LONG, stream=True)
            next(stream)
            server.engine.close()
        server.engine._decoder = server.engine.model.decoders.take(server.engine.model, 4, 256)
        with pytest.raises(openai.APIError, match="the server shuts down"):
            list(stream)


def test_unexpected_exception_tells_nothing(server, client, monkeypatch):
    monkeypatch.setattr(type(server.engine.model), "request", lambda *_, **__: 1 / 0)
    with pytest.raises(openai.InternalServerError) as found:
        client.completions.create(model="tiny", prompt="a")
    assert error_of(found.value.response.content) == {
        "message": "internal error: the server's log has the reason", "type": "server_error",
        "param": None, "code": None,
    }  # fmt: skip
    server.wait_until_idle()
