"""Runs random requests, cancellations and errors for a minute, or for GEMMA_FAST_SOAK_SECONDS:
memory stays flat, no row or place is lost, and texts are right in the end as in the beginning."""

import asyncio
import collections
import gc
import logging
import os
import random
import time

import httpx
import psutil
import pytest
from http_server import running

from gemma_fast.engine.scheduler import Scheduler

SECONDS = float(os.environ.get("GEMMA_FAST_SOAK_SECONDS", "60"))
CLIENTS = 12
GROWTH = 24 << 20  # bytes of the process, which contains server and clients
KINDS = ("200", "400", "429", "500", "failed", "failed in stream", "streamed", "left")
WORDS = ["hello", "the", "world", "é", "漢", "\n", "<end_of_turn>", "in"]
# Few texts, because the tokenizer keeps the tokens of 10,000 words.
TEXTS = [
    " ".join(random.Random(i).choices(WORDS, k=length))
    for i in range(8) for length in (1, 5, 30, 150)
]  # fmt: skip
USER = {"role": "user", "content": "hello"}


def random_body(rng: random.Random) -> tuple[str, dict]:
    """Returns path and body of a request, which may be bad."""
    text = rng.choice(TEXTS)
    body = {
        "max_tokens": rng.choice([1, 5, 20, 60]), "stream": rng.random() < 0.6,
        "n": rng.choice([1, 1, 1, 3]), "temperature": rng.choice([0, 0.8, 1.5]),
    }  # fmt: skip
    more = [
        {"stop": ["e", "the"]}, {"logit_bias": {"9": 3, "1": -100}}, {"top_p": 0.5},
        {"repetition_penalty": 1.4}, {"seed": 5}, {"top_k": 4}, {"min_p": 0.2},
        {"temperature": -1}, {"max_tokens": 10_000}, {"unknown": 1}, {"n": 1000},
    ]  # fmt: skip
    for extra in rng.sample(more, rng.randint(0, 2)):
        body |= extra
    if rng.random() < 0.3:
        messages = [{**USER, "content": text}] + [USER] * (rng.random() < 0.1)
        return "chat/completions", {**body, "messages": messages, "logprobs": rng.random() < 0.3}
    logprobs = {"logprobs": 3} if rng.random() < 0.3 else {}
    return "completions", {**body, "prompt": text, **logprobs}


async def ask(client: httpx.AsyncClient, rng: random.Random) -> str:
    """Sends a request, and goes away at a random time. Returns what happened."""
    path, body = random_body(rng)
    leaves = rng.random() < 0.3
    seconds = rng.uniform(0, 0.2) if leaves else 60
    try:
        async with client.stream("POST", f"/v1/{path}", json=body, timeout=60) as answer:
            if leaves:
                await asyncio.sleep(seconds)
                return "left"
            content = await answer.aread()
    except httpx.TimeoutException:
        return "late"
    if answer.status_code == 200 and body["stream"]:
        return "failed in stream" if b'"error"' in content else "streamed"
    return str(answer.status_code)


def memory() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


async def soak(server, seconds: float) -> collections.Counter:
    found: collections.Counter = collections.Counter()
    end = time.monotonic() + seconds

    async def work(seed: int) -> None:
        rng = random.Random(seed)
        async with httpx.AsyncClient(base_url=server.url) as client:
            while time.monotonic() < end:
                found[await ask(client, rng)] += 1

    await asyncio.gather(*(work(random.getrandbits(32)) for _ in range(CLIENTS)))
    return found


@pytest.mark.slow
def test_soak(tiny, monkeypatch, request):
    step, rng = Scheduler.step, random.Random(0)

    def failing(self):
        if rng.random() < 0.002:
            raise RuntimeError("a step fails")
        return step(self)

    monkeypatch.setattr(Scheduler, "step", failing)
    logging.disable()  # pytest would store each record, with the frames of its traceback
    request.addfinalizer(lambda: logging.disable(logging.NOTSET))
    with running(*tiny, engine={"batch_size": 4, "queue": 8, "chunk": 32}) as server:

        def text() -> str:
            create = server.client(max_retries=5).completions.create
            options = {"prompt": "hello the", "max_tokens": 30, "temperature": 0}
            return create(model="tiny", **options).choices[0].text

        expected = text()
        found = asyncio.run(soak(server, SECONDS / 3))
        server.wait_until_idle()
        before = memory()
        found += asyncio.run(soak(server, SECONDS * 2 / 3))
        server.wait_until_idle()
        grown = memory() - before
        print(dict(found), f"grown by {grown / 1e6:.1f} MB")
        assert text() == expected
        assert not server.engine._tickets
        assert server.engine.scheduler.tokens == 0
    assert grown < GROWTH
    found["failed"] = found["500"] + found["failed in stream"]
    assert found.keys() <= {*KINDS}
    for kind in ("200", "400", "429", "failed", "streamed", "left"):
        assert found[kind], f"no request got {kind}: {found}"
