"""Tests the limits of the server, its key, the names it answers to, and its metrics."""

import json
import socket
import threading
import time

import httpx
import openai
import pytest
from http_server import JSON, check, error_of, post, running

from gemma_fast.server.limits import Limits
from gemma_fast.text.tokenizer import Tokenizer

USER = {"role": "user", "content": "hello"}


def test_body_above_the_limit_is_refused(server, client):
    with pytest.raises(
        openai.APIStatusError, match="the body has more than 4194304 bytes"
    ) as found:
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "a" * 1_000_000}] * 10
        )
    assert found.value.status_code == 413


def test_body_without_a_length_is_refused_above_the_limit(server):
    def parts():
        yield b'{"prompt": "'
        for _ in range(10):
            yield b"a" * 1_000_000

    check(post(server, "completions", parts()), 413, "more than 4194304 bytes")


def test_bodies_of_all_requests_have_a_limit(tiny):
    with running(*tiny, limits=Limits(bodies_bytes=1000)) as server:
        body = json.dumps({"prompt": "a", "max_tokens": 2, "user": "a" * 700})
        host, port = server.url.removeprefix("http://").split(":")
        for _ in range(3):  # what a client has sent is given back when it goes away
            assert post(server, "completions", body).status_code == 200
            with socket.create_connection((host, int(port))) as slow:
                head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 900\r\n"
                slow.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
                end = time.monotonic() + 20
                while (response := post(server, "completions", body)).status_code == 200:
                    assert time.monotonic() < end
                check(response, 503, "the bodies of all requests are too large")
            while post(server, "completions", body).status_code != 200:
                assert time.monotonic() < end


def test_long_prompt_is_refused_before_it_is_encoded(server, monkeypatch):
    for name in ("encode", "apply_chat_template"):
        monkeypatch.setattr(type(server.engine.tokenizer), name, None)
    text = "hello " * 500_000
    message = "the prompt has 3000000 characters, which are more than 255 tokens"
    check(post(server, "completions", json.dumps({"prompt": text})), 400, message, "prompt")
    parts = [{"type": "text", "text": text}]
    for content, more in ((text, {}), (parts, {}), ("a", {"tools": [{text: [1]}]})):
        body = {"messages": [{**USER, "content": content}], **more}
        response = post(server, "chat/completions", json.dumps(body))
        check(response, 400, "characters, which are more than 255 tokens", "messages")
    monkeypatch.undo()
    longest = max(server.engine.tokenizer.get_vocab(), key=len)
    body = {"prompt": longest * 200, "max_tokens": 1}
    assert post(server, "completions", json.dumps(body)).json()["usage"]["prompt_tokens"] == 201


def test_template_that_loops_ends(tiny):
    model, tokenizer = tiny
    loops = Tokenizer.from_pretrained(
        tokenizer.name_or_path,
        chat_template="{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2,
    )
    with running(model, loops) as server:
        client = server.client()
        request = httpx.Request(
            "POST", f"{server.url}/v1/chat/completions", headers=JSON,
            content=json.dumps({"messages": [USER]}),
        )  # fmt: skip
        found = []
        thread = threading.Thread(
            target=lambda: found.append(httpx.Client(timeout=60).send(request))
        )
        thread.start()
        for _ in range(5):  # meanwhile, other requests are answered
            client.completions.create(model="tiny", prompt="a", max_tokens=2)
        assert not found
        thread.join()
        assert found[0].status_code == 400
        assert "the template" in error_of(found[0].content)["message"]
        server.wait_until_idle()


def test_limits_of_tokens(tiny):
    limits = Limits(prompt_tokens=5, new_tokens=7)
    with running(*tiny, limits=limits) as server:
        create = server.client().completions.create
        with pytest.raises(openai.BadRequestError, match="max_tokens=8 is above the limit of 7"):
            create(model="tiny", prompt="a", max_tokens=8)
        with pytest.raises(
            openai.BadRequestError, match="the prompt has 12 tokens; the limit is 5"
        ):
            create(model="tiny", prompt="a b c d e f")
        assert create(model="tiny", prompt="a", temperature=0).usage.completion_tokens == 7


def test_key_is_needed(tiny):
    with running(*tiny, keys=["first", "second é", "à"]) as server:
        for key in ("first", "second é", "à"):  # the last byte of à is a space in Latin-1
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200
        for key in ("", "wrong", "firs", "first2", "second"):
            with pytest.raises(openai.AuthenticationError, match="missing or wrong") as found:
                server.client(api_key=key or "x").models.list()
            assert found.value.response.headers["www-authenticate"] == "Bearer"
        for path in ("v1/models", "metrics", "v1/completions", "nowhere"):
            response = httpx.get(f"{server.url}/{path}")
            assert (response.status_code, error_of(response.content)["code"]) == (
                401, "invalid_api_key",
            )  # fmt: skip
        large = post(server, "completions", b"x" * 5_000_000, Authorization="Basic first")
        assert large.status_code == 401, "the key is checked before the body is read"
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_other_hosts_are_refused(tiny):
    """A web page can let its host name resolve to 127.0.0.1."""
    with running(*tiny, hosts=["127.0.0.1", "localhost", "[::1]"]) as server:
        for host in ("127.0.0.1:80", "localhost", "LOCALHOST:8000", "[::1]:8000", "[::1]"):
            assert httpx.get(f"{server.url}/health", headers={"Host": host}).status_code == 200
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example"):
            response = httpx.get(f"{server.url}/health", headers={"Host": host})
            check(response, 403, "is not that of this server")


def test_client_that_sends_no_body_is_ended(tiny):
    with running(*tiny, limits=Limits(body_seconds=0.3)) as server:

        def parts():
            yield b"{"
            time.sleep(1)
            yield b"}"

        check(post(server, "completions", parts()), 408, "the body did not arrive in time")


def test_metrics(server, client):
    client.completions.create(model="tiny", prompt="hello", max_tokens=3, temperature=0)
    page = httpx.get(f"{server.url}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    assert float(values["gemma_fast_new_tokens_total"]) >= 3
    assert float(values["gemma_fast_prompt_tokens_total"]) >= 2
    assert float(values['gemma_fast_texts_total{reason="length"}']) >= 1
    assert float(values["gemma_fast_time_to_first_token_seconds_count"]) >= 1
    assert float(values["gemma_fast_time_per_token_seconds_count"]) >= 1
    for gauge in ("texts_waiting", "texts_running", "cache_used_ratio"):
        assert float(values[f"gemma_fast_{gauge}"]) == 0
    answered = 'gemma_fast_responses_total{path="/v1/completions",status="200"}'
    assert float(values[answered]) >= 1
