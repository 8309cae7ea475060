"""Tests that bad requests get a clear error in OpenAI's shape, and that the server goes on."""

import json

import httpx
import openai
import pytest
from chat_templates import WITH_TOOLS
from http_server import check, error_of, post, running
from pydantic import ValidationError

from gemma_fast.server.schema import (
    MAX_BIASES,
    MAX_MESSAGES,
    MAX_PROMPTS,
    MAX_TOOLS,
    ChatBody,
    CompletionBody,
)
from gemma_fast.text.tokenizer import Tokenizer

USER = {"role": "user", "content": "hello"}
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(autouse=True)
def _server_goes_on(server, client):
    yield
    answer = client.completions.create(model="tiny", prompt="hello", max_tokens=2, temperature=0)
    assert answer.usage.completion_tokens == 2
    server.wait_until_idle()


COMPLETIONS = [
    ({"prompt": None}, "prompt=None: Input should be a valid array", "prompt"),
    ({"prompt": 5}, "prompt=5: Input should be a valid array", "prompt"),
    ({"prompt": []}, "prompt=[]: List should have at least 1 item", "prompt"),
    ({"prompt": [["a"]]}, "prompt.0", "prompt"),
    ({"prompt": [[]]}, "the prompt is empty", None),
    ({"prompt": [999_999]}, "token id 999999 is outside the vocabulary", None),
    ({"prompt": [-1]}, "token id -1 is outside the vocabulary", None),
    ({"prompt": [2**70]}, "must be token ids", None),
    ({"prompt": [[5]] * (MAX_PROMPTS + 1)}, "4097 prompts are above the limit", "prompt"),
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
    ({"logit_bias": {"999999": 1}}, "'999999' is not a token id from 0 to", "logit_bias"),
    ({"logit_bias": {"5": "x"}}, "logit_bias.5='x': Input should be a valid number", "logit_bias"),
    ({"logit_bias": {"5": 1e39}}, "logit_bias.5=1e+39: Input should be less than", "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(MAX_BIASES + 1)}},
     "1025 biases are above the limit of 1024", "logit_bias"),
    ({"repetition_penalty": 1e-320}, "greater than or equal to 0.01", "repetition_penalty"),
    ({"best_of": 2}, "best_of=2: Value error, best_of must equal n", "best_of"),
    ({"echo": True}, "echo=True is not supported: prepend the prompt", "echo"),
    ({"suffix": "a"}, "suffix='a' is not supported", "suffix"),
    ({"frequency_penalty": 0.5}, "use repetition_penalty", "frequency_penalty"),
    ({"stream_options": {"x": 1}}, "stream_options.x=1", "stream_options"),
    ({"stream_options": {str(i): 1 for i in range(99)}}, "99 fields, but the known ones are",
     "stream_options"),
    ({"temprature": 1}, "'temprature': did you mean temperature?", "temprature"),
    ({"chat_template": "{{ 1 }}"}, "unexpected keyword argument 'chat_template'", "chat_template"),
]  # fmt: skip
CHATS = [
    ({"messages": []}, "messages=[]: List should have at least 1 item", "messages"),
    ({"messages": "hello"}, "messages='hello': Input should be a valid array", "messages"),
    ({"messages": [USER] * (MAX_MESSAGES + 1)}, "at most 10000 items", "messages"),
    ({"messages": [USER], "tools": [{}] * (MAX_TOOLS + 1)}, "at most 1024 items", "tools"),
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
        (b'{"prompt": "a", "logit_bias": {"5": NaN}}', "logit_bias.5=nan"),
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
    check(httpx.get(f"{server.url}/health/"), 404, "GET '/health/': Not Found")
    headers = {"Content-Type": "text/plain"}
    check(post(server, "completions", b"{}", **headers), 415, "must be application/json")


def test_errors_of_a_template_name_no_file(server, tiny):
    response = post(server, "chat/completions", json.dumps({"messages": [USER, USER]}))
    error = error_of(response.content)
    assert error["message"].startswith("the model: the template failed: TemplateError")
    assert tiny[1].name_or_path not in error["message"]


def test_tools_need_a_template_with_tools(tiny):
    model, tokenizer = tiny
    tools = Tokenizer.from_pretrained(tokenizer.name_or_path, chat_template=WITH_TOOLS)
    with running(model, tools) as server:
        body = {"messages": [USER], "tools": [{"type": "function"}], "max_tokens": 2}
        assert post(server, "chat/completions", json.dumps(body)).status_code == 200
        body["tools"] = [5]
        response = post(server, "chat/completions", json.dumps(body))
        check(response, 400, "a tool must be a dict with its JSON schema, not 5", "messages")
