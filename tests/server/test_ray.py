"""Tests the server in Ray Serve, with two replicas on this machine."""

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from chat_checkpoint import write_chat_checkpoint
from http_server import error_of

from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.engine.request import seed_of
from gemma_fast.text.tokenizer import Tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_chat_checkpoint(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def url(checkpoint, tmp_path_factory):
    """Runs two replicas, and returns their address."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("secret\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        ray = pytest.importorskip("ray")
        from ray import serve

        from gemma_fast.server.ray import build

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
        settings = {
            "model": str(checkpoint), "served_name": "chat0", "device": "cpu", "dtype": "float32",
            "max_length": "256", "batch_size": "4", "api_key_file": str(keys), "replicas": "2",
            "cpus": "0.5",
        }  # fmt: skip
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(settings), name="test")
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
        ray.shutdown()


def metric(url: str, name: str) -> set[float]:
    """Returns the values of the replicas, each of which has metrics of its own."""
    headers = {"Authorization": "Bearer secret"}
    with ThreadPoolExecutor(16) as pool:  # several at once, so that both replicas get some
        pages = [*pool.map(lambda _: httpx.get(f"{url}/metrics", headers=headers).text, range(96))]
    lines = {line for page in pages for line in page.splitlines() if line.startswith(f"{name} ")}
    return {float(line.split()[1]) for line in lines}


def test_replicas_share_the_requests(url, checkpoint):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
    model = GemmaForCausalLM.from_pretrained(checkpoint, device="cpu", dtype="float32")
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    ids = tokenizer("hello the", return_tensors="pt").input_ids

    def ask(seed: int) -> list[list[str]]:
        answer = client.completions.create(
            model="chat0", prompt="hello the", seed=seed, n=2, max_tokens=20, logprobs=0
        )
        return [choice.logprobs.tokens for choice in answer.choices]

    with ThreadPoolExecutor(16) as pool:
        found = [*pool.map(ask, range(48))]
    for seed, texts in enumerate(found):
        for i, tokens in enumerate(texts):
            new = model.generate(
                ids, max_new_tokens=20, seed=seed_of(seed, i), do_sample=True, top_k=0
            )[0, ids.shape[1] :]  # fmt: skip
            assert len(tokens) == len(new)
            special = [x for x in tokens if not x.startswith("bytes:")]
            names = tokenizer.convert_ids_to_tokens(new.tolist())
            expected = [
                tokenizer.decode([int(token)])
                for name, token in zip(names, new, strict=True) if not name.startswith("<0x")
            ]  # fmt: skip
            assert special == expected
    headers = {"Authorization": "Bearer secret"}
    answered = {}
    for _ in range(100):  # each replica has metrics of its own, also if their values are equal
        page = httpx.get(f"{url}/metrics", headers=headers).text
        values = dict(line.rsplit(" ", 1) for line in page.splitlines() if line[:1] != "#")
        created = values["gemma_fast_new_tokens_created"]
        answered[created] = float(values["gemma_fast_new_tokens_total"])
    assert len(answered) == 2
    total = sum(answered.values())
    assert total == sum(len(tokens) for texts in found for tokens in texts)


def test_streams_and_errors_pass_through(url):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
    options = {"model": "chat0", "messages": [{"role": "user", "content": "hello"}], "seed": 1}
    whole = client.chat.completions.create(**options, max_tokens=30)
    chunks = [*client.chat.completions.create(**options, max_tokens=30, stream=True)]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="temperature=-1"):
        client.chat.completions.create(**options, temperature=-1)
    response = httpx.get(f"{url}/v1/models")
    assert (response.status_code, error_of(response.content)["code"]) == (401, "invalid_api_key")


def test_client_that_goes_away_frees_its_rows(url):
    body = {"prompt": "a", "n": 100, "max_tokens": 200, "logit_bias": {"1": -100}, "stream": True}
    headers = {"Authorization": "Bearer secret"}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers) as answer:
        next(answer.iter_lines())
    end = time.monotonic() + 5  # its texts take longer
    while not metric(url, 'gemma_fast_texts_total{reason="cancelled"}'):
        assert time.monotonic() < end
    assert metric(url, "gemma_fast_texts_running") == {0.0}
