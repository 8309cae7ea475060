"""Tests that clients share the engine: none is mixed up with another, and none keeps a place that
it no longer needs."""

import asyncio
import json
import random
import socket
import time

import httpx
import openai
import pytest
from http_server import LONG, error_of, running, slow_steps, wait_for

from gemma_fast.server.limits import Guard, Limits
from gemma_fast.server.metrics import Metrics


def send(server, path: str, body: dict) -> socket.socket:
    """Sends a request, and does not read the answer."""
    host, port = server.url.removeprefix("http://").split(":")
    client = socket.socket()
    client.connect((host, int(port)))
    content = json.dumps(body).encode()
    head = f"POST /v1/{path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return client


def test_64_clients_at_once_get_their_own_texts(tiny):
    """Each client has a prompt, seed and length of its own; half of them stream."""
    model, tokenizer = tiny
    rng = random.Random(0)
    words = ["hello", "the", "world", "in", "a", "é", "thinner", "漢"]
    prompts = [" ".join(rng.choices(words, k=rng.randint(1, 40))) for _ in range(64)]
    options = [
        {"max_tokens": rng.randint(1, 60), "seed": seed, "temperature": rng.choice([0, 0.7, 1.2]),
         "extra_body": {"top_k": rng.choice([0, 3])}}
        for seed in range(64)
    ]  # fmt: skip

    async def ask(client, i: int) -> list[str]:
        create = client.completions.create
        given = {"model": "tiny", "prompt": prompts[i], "logprobs": 0, **options[i]}
        if i % 2:
            return (await create(**given)).choices[0].logprobs.tokens
        stream = await create(**given, stream=True)
        return [x async for chunk in stream for x in chunk.choices[0].logprobs.tokens]

    async def ask_all(server) -> list[list[str]]:
        async with server.async_client() as client:
            return await asyncio.gather(*(ask(client, i) for i in range(64)))

    with running(model, tokenizer, engine={"batch_size": 16, "chunk": 32}) as server:
        found = asyncio.run(ask_all(server))
        server.wait_until_idle()
        for tokens, prompt, given in zip(found, prompts, options, strict=True):
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            new = model.generate(
                ids, max_new_tokens=given["max_tokens"], seed=given["seed"], do_sample=True,
                temperature=given["temperature"], top_k=given["extra_body"]["top_k"],
            )[0, ids.shape[1] :]  # fmt: skip
            names = tokenizer.convert_ids_to_tokens(new.tolist())
            assert tokens == [
                f"bytes:\\x{int(name[3:5], 16):02x}" if name.startswith("<0x") else
                tokenizer.decode([int(token)]) for name, token in zip(names, new, strict=True)
            ]  # fmt: skip


def test_full_queue_is_refused_and_the_others_go_on(tiny):
    with running(*tiny, engine={"batch_size": 2, "queue": 1}) as server, slow_steps(server):
        client = server.client()
        streams = [client.completions.create(**LONG, stream=True) for _ in range(3)]
        with pytest.raises(openai.RateLimitError, match="its limit of 3 texts") as found:
            client.completions.create(**LONG)
        assert found.value.code == "queue_full"
        assert found.value.response.headers["retry-after"] == "1"
        with pytest.raises(
            openai.BadRequestError, match="asks for 4 texts, but the server takes 3"
        ):
            client.completions.create(**LONG, n=4)
        wait_for(lambda: server.engine.scheduler.waiting == 1)
        streams[0].close()
        wait_for(lambda: server.engine.taken == 2)
        client.completions.create(**{**LONG, "max_tokens": 2})
        for stream in streams[1:]:
            assert len([*stream]) > 50, "they were not disturbed"
        server.wait_until_idle()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_client_that_goes_away_frees_its_row(server, stream, path):
    body = {**LONG, "stream": stream, "n": 2, "messages": [{"role": "user", "content": "a"}]}
    del body["messages" if path == "completions" else "prompt"]
    body["logit_bias"] = {str(x): -100 for x in server.engine.tokenizer.stop_token_ids}
    with slow_steps(server), send(server, path, body) as client:
        wait_for(lambda: server.engine.scheduler.running == 2)
        if stream:
            assert client.recv(9) == b"HTTP/1.1 "
        client.close()
        start = time.monotonic()
        server.wait_until_idle()
        assert time.monotonic() - start < 2, "the text would take 4 s"


def test_client_that_goes_away_while_its_prompt_is_prepared_frees_its_place(server, monkeypatch):
    tokenizer = type(server.engine.tokenizer)
    encode = tokenizer.encode

    def slow(self, *args, **kwargs):
        time.sleep(1)
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(tokenizer, "encode", slow)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=0.3)
    server.wait_until_idle(0.5)
    time.sleep(1)
    assert not server.engine.scheduler


def test_text_ends_after_the_time_limit(tiny):
    with running(*tiny, limits=Limits(seconds=0.5)) as server, slow_steps(server):
        answer = server.client().completions.create(**LONG)
        assert 1 < answer.usage.completion_tokens < 100
        assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("starts", [False, True])
def test_request_that_takes_too_long_is_ended(starts):
    """For example, because its client does not read the answer."""
    start, ended = {"type": "http.response.start", "status": 200, "headers": []}, []

    async def stalls(scope, receive, send):
        try:
            if starts:
                await send(start)
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def receive():
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def run() -> list:
        sent = []

        async def send(message):
            sent.append(message)

        limits = Limits(seconds=0.1, body_seconds=0.1, send_seconds=0.1)
        scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
        try:
            await Guard(stalls, limits, Metrics())(scope, receive, send)
        except asyncio.TimeoutError:
            sent.append("closed")
        return sent

    sent = asyncio.run(run())
    assert ended
    if starts:
        assert sent == [start, "closed"]
    else:
        assert sent[0]["status"] == 408
        assert "took too long" in error_of(sent[1]["body"])["message"]
