"""Tests that bad requests get a clear error in OpenAI's shape, and that the server goes on."""

import json
import threading
import time

import httpx
import openai
import pytest
from chat_templates import WITH_TOOLS
from http_server import error_of, running
from pydantic import ValidationError

from gemma_fast.server.limits import Limits
from gemma_fast.server.schema import MAX_BIASES, ChatBody, CompletionBody
from gemma_fast.text.tokenizer import Tokenizer

USER = {"role": "user", "content": "hello"}
JSON = {"Content-Type": "application/json"}
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(autouse=True)
def _server_goes_on(server, client):
    yield
    answer = client.completions.create(model="tiny", prompt="hello", max_tokens=2, temperature=0)
    assert answer.usage.completion_tokens == 2
    server.wait_until_idle()


def post(server, path: str, content, **headers) -> httpx.Response:
    return httpx.post(
        f"{server.url}/v1/{path}", content=content, headers={**JSON, **headers}, timeout=60
    )


COMPLETIONS = [
    ({"prompt": None}, "prompt=None: Input should be a valid array", "prompt"),
    ({"prompt": 5}, "prompt=5: Input should be a valid array", "prompt"),
    ({"prompt": []}, "prompt=[]: List should have at least 1 item", "prompt"),
    ({"prompt": [["a"]]}, "prompt.0", "prompt"),
    ({"prompt": [[]]}, "the prompt is empty", None),
    ({"prompt": [999_999]}, "token id 999999 is outside the vocabulary", None),
    ({"prompt": [-1]}, "token id -1 is outside the vocabulary", None),
    ({"prompt": [2**70]}, "must be token ids", None),
    ({"prompt": "a " * 300}, "the prompt has 601 tokens; the limit is 255", "prompt"),
    ({"max_tokens": 0}, "max_tokens=0: Input should be greater than or equal to 1", "max_tokens"),
    ({"max_tokens": 300}, "max_tokens=300 do not fit 256 tokens", "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens='5': Input should be a valid integer", "max_tokens"),
    ({"max_tokens": True}, "max_tokens=True: Input should be a valid integer", "max_tokens"),
    ({"temperature": -1}, "temperature=-1", "temperature"),
    ({"temperature": 1e-9}, "temperature=1e-09 is out of range", None),
    ({"temperature": 1e99}, "temperature=1e+99 is out of range", None),
    ({"top_p": 1.5}, "top_p=1.5", "top_p"),
    ({"n": 0}, "n=0", "n"),
    ({"n": 129}, "n=129: Input should be less than or equal to 128", "n"),
    ({"n": 10, "prompt": ["a"] * 100}, "asks for 1000 texts, but the server takes 260", "n"),
    ({"seed": -1}, "seed=-1", "seed"),
    ({"seed": 2**63}, "seed=9223372036854775808", "seed"),
    ({"stop": ["a"] * 17}, "List should have at most 16 items", "stop"),
    ({"stop": ["a"] * 10_000}, "List should have at most 16 items", "stop"),
    ({"stop": ""}, "stop.0='': String should have at least 1 character", "stop"),
    ({"stop": ["a" * 257]}, "String should have at most 256 characters", "stop"),
    ({"stop": [5]}, "stop.0=5: Input should be a valid string", "stop"),
    ({"logprobs": 21}, "logprobs=21", "logprobs"),
    ({"logprobs": 20, "n": 120, "max_tokens": 240}, "120 texts of max_tokens=240 have more than"
     " 262144 values: ask for fewer", "logprobs"),
    ({"logprobs": 20, "prompt": ["a"] * 120, "max_tokens": 240}, "262144 values", "logprobs"),
    ({"logit_bias": {"x": 1}}, "logit_bias: 'x' is not a token id", "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias: '-1' is not a token id", "logit_bias"),
    ({"logit_bias": {"999999": 1}}, "sequence_bias: (999999,) must be", None),
    ({"logit_bias": {"5": "x"}}, "sequence_bias=", None),
    ({"logit_bias": {str(i): 1 for i in range(MAX_BIASES + 1)}}, "at most 1024", "logit_bias"),
    ({"best_of": 2}, "best_of=2: Value error, best_of must equal n", "best_of"),
    ({"echo": True}, "echo=True is not supported: prepend the prompt", "echo"),
    ({"suffix": "a"}, "suffix='a' is not supported", "suffix"),
    ({"frequency_penalty": 0.5}, "use repetition_penalty", "frequency_penalty"),
    ({"stream_options": {"x": 1}}, "stream_options.x=1", "stream_options"),
    ({"temprature": 1}, "'temprature': did you mean temperature?", "temprature"),
    ({"chat_template": "{{ 1 }}"}, "unexpected keyword argument 'chat_template'", "chat_template"),
]  # fmt: skip
CHATS = [
    ({"messages": []}, "messages=[]: List should have at least 1 item", "messages"),
    ({"messages": "hello"}, "messages='hello': Input should be a valid array", "messages"),
    ({"messages": ["hello"]}, "messages.0='hello'", "messages"),
    ({"messages": [{}]}, "message 0 must be a dict with role and content", "messages"),
    ({"messages": [{**USER, "role": "<eos>"}]}, "'<eos>' is not a role", "messages"),
    ({"messages": [USER, USER]}, "Conversation roles must alternate", "messages"),
    ({"messages": [{**USER, "content": [{"type": "image_url"}]}]}, "only text", "messages"),
    ({"messages": [USER], "tools": [{"a": 1}]}, "this model has no tools", "tools"),
    ({"messages": [USER], "tool_choice": "required"}, "tool_choice='required'", "tool_choice"),
    ({"messages": [USER], "response_format": {"type": "json_object"}}, "'text'", "response_format"),
    ({"messages": [USER], "top_logprobs": 3}, "top_logprobs needs logprobs=true", "top_logprobs"),
    ({"messages": [USER], "functions": [{}]}, "functions=[{}] is not supported", "functions"),
    ({"messages": [USER], "chat_template_kwargs": {"tokenize": False}}, "Extra inputs",
     "chat_template_kwargs"),
    ({"messages": [USER], "reasoning_effort": "low"}, "enable_thinking", "reasoning_effort"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [5]}]}, "a tool call must be",
     "messages"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "1", "function": {
        "name": "f", "arguments": "[1"}}]}]}, "must be a JSON object, not '[1'", "messages"),
]  # fmt: skip


def check(response: httpx.Response, status: int, message: str, param: str | None = None) -> None:
    error = error_of(response.content)
    assert (response.status_code, error["param"]) == (status, param), error
    assert message in error["message"]
    assert len(error["message"]) < 400


@pytest.mark.parametrize(("body", "message", "param"), COMPLETIONS, ids=lambda x: f"{x!s:.40}")
def test_bad_completion_is_refused(server, body, message, param):
    content = json.dumps({"prompt": "hello", **body})
    check(post(server, "completions", content), 400, message, param)


@pytest.mark.parametrize(("body", "message", "param"), CHATS, ids=lambda x: f"{x!s:.40}")
def test_bad_chat_is_refused(server, body, message, param):
    check(post(server, "chat/completions", json.dumps(body)), 400, message, param)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "the body"),
        (b'"a"', "the body"),
        (b'{"prompt": "\xff\xfe"}', "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (f'{{"prompt": {DEEP}}}'.encode(), "not valid JSON: recursion limit exceeded"),
        (f'{{"prompt": "a", "user": {DEEP}}}'.encode(), "not valid JSON: recursion limit"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature=nan"),
        (b'{"prompt": "a", "top_p": Infinity}', "top_p=inf"),
        (b'{"prompt": "a", "logit_bias": {"5": NaN}}', "sequence_bias="),
        (b'{"prompt": [[' + b"true," * 500_000 + b"true]]}", "prompt.0"),
    ],
    ids=lambda x: f"{x!s:.30}",
)
def test_malformed_body_is_refused(server, content, message):
    response = post(server, "completions", content)
    assert response.status_code == 400
    error = error_of(response.content)
    assert message in error["message"]


@pytest.mark.parametrize("prompt", [["a", *[True] * 9999], [[True] * 9999], [True] * 9999])
def test_list_of_bad_items_gives_few_errors(prompt):
    """A list of errors takes memory."""
    with pytest.raises(ValidationError) as found:
        CompletionBody.model_validate_json(json.dumps({"prompt": prompt}))
    assert found.value.error_count() <= 2
    with pytest.raises(ValidationError) as found:
        ChatBody.model_validate_json(json.dumps({"messages": prompt}))
    assert found.value.error_count() == 1


def test_deep_messages_are_refused(server):
    deep = "[" * 90 + "]" * 90  # within the limit of JSON, above that of messages
    body = f'{{"messages": [{{"role": "user", "content": {deep}}}]}}'
    check(post(server, "chat/completions", body), 400, "nested more than 64 levels", "messages")


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


def test_long_prompt_is_refused_before_it_is_encoded(server, monkeypatch):
    for name in ("encode", "apply_chat_template"):
        monkeypatch.setattr(type(server.engine.tokenizer), name, None)
    text = "hello " * 500_000
    message = "the prompt has 3000000 characters, which are more than 255 tokens"
    check(post(server, "completions", json.dumps({"prompt": text})), 400, message, "prompt")
    body = {"messages": [{**USER, "content": text}]}
    check(post(server, "chat/completions", json.dumps(body)), 400, message, "messages")
    monkeypatch.undo()
    longest = max(server.engine.tokenizer.get_vocab(), key=len)
    body = {"prompt": longest * 200, "max_tokens": 1}
    assert post(server, "completions", json.dumps(body)).json()["usage"]["prompt_tokens"] == 201


def test_official_client_raises_its_errors(server, client):
    with pytest.raises(openai.BadRequestError, match="temperature=-1"):
        client.completions.create(model="tiny", prompt="a", temperature=-1)
    with pytest.raises(openai.NotFoundError, match="the model 'gpt-4' does not exist") as found:
        client.completions.create(model="gpt-4", prompt="a")
    assert found.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError, match="POST '/v1/embeddings': Not Found"):
        client.embeddings.create(model="tiny", input="a")


def test_other_methods_and_types_are_refused(server):
    check(httpx.get(f"{server.url}/v1/completions"), 405, "Method Not Allowed")
    headers = {"Content-Type": "text/plain"}
    check(post(server, "completions", b"{}", **headers), 415, "must be application/json")


def test_errors_of_a_template_name_no_file(server, tiny):
    response = post(server, "chat/completions", json.dumps({"messages": [USER, USER]}))
    error = error_of(response.content)
    assert error["message"].startswith("the model: the template failed: TemplateError")
    assert tiny[1].name_or_path not in error["message"]


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


def test_tools_need_a_template_with_tools(tiny):
    model, tokenizer = tiny
    tools = Tokenizer.from_pretrained(tokenizer.name_or_path, chat_template=WITH_TOOLS)
    with running(model, tools) as server:
        body = {"messages": [USER], "tools": [{"type": "function"}], "max_tokens": 2}
        assert post(server, "chat/completions", json.dumps(body)).status_code == 200
        body["tools"] = [5]
        response = post(server, "chat/completions", json.dumps(body))
        check(response, 400, "a tool must be a dict with its JSON schema, not 5", "messages")


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
    with running(*tiny, keys=["first", "second é"]) as server:
        for key in ("first", "second é"):
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
