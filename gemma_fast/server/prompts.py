"""Turns the body of an HTTP request into requests of the engine: renders and encodes prompts, and
applies limits and defaults. These functions may take seconds, so they run in a pool of threads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemma_fast.engine.options import as_mapping
from gemma_fast.engine.request import Request, seed_of
from gemma_fast.server.engine import Engine
from gemma_fast.server.errors import BadRequest
from gemma_fast.server.limits import Limits
from gemma_fast.server.schema import MAX_VALUES, Body, ChatBody, CompletionBody
from gemma_fast.text.tokenizer import Tokenizer

COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions
# OpenAI's defaults, for a checkpoint whose generation_config does not sample.
SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
TOOLS = re.compile(r"\btools\b")


def chat_requests(engine: Engine, limits: Limits, body: ChatBody) -> list[Request]:
    """Returns n requests for a chat. Raises BadRequest."""
    tokenizer = engine.tokenizer
    _check_characters(engine, limits, [body.messages, body.offered], "messages")
    with _bad_requests(tokenizer, "messages"):
        ids = _render(tokenizer, body)
    room = _room(engine, limits, ids, "messages")
    ends = sorted({*engine.model.end_token_ids, *tokenizer.stop_token_ids})
    new = body.new_tokens or room
    return _requests(engine, limits, body, ids, new, {"eos_token_id": ends})


def completion_requests(engine: Engine, limits: Limits, body: CompletionBody) -> list[Request]:
    """Returns n requests for each prompt, prompt by prompt. Raises BadRequest."""
    found: list[Request] = []
    for prompt in body.prompt:
        _check_characters(engine, limits, prompt, "prompt")
        with _bad_requests(engine.tokenizer, "prompt"):
            ids = engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        room = _room(engine, limits, ids, "prompt")
        new = body.new_tokens or min(COMPLETION_TOKENS, room)
        found += _requests(engine, limits, body, ids, new, {})
    return found


def _render(tokenizer: Tokenizer, body: ChatBody) -> list[int]:
    options = body.chat_template_kwargs
    variables: dict[str, Any] = {}
    if options is not None and options.enable_thinking is not None:
        variables["enable_thinking"] = options.enable_thinking
    if body.offered:
        has_template = tokenizer.chat_template is not None
        template = tokenizer.get_chat_template(tools=body.offered) if has_template else ""
        if not TOOLS.search(template):
            raise BadRequest("the chat template of this model has no tools", "tools")
    encoding = tokenizer.apply_chat_template(
        _with_calls(body.messages), tools=body.offered, add_generation_prompt=True, **variables
    )
    return encoding.input_ids


def _with_calls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the messages as templates expect them: arguments of calls are objects, not JSON, and
    the result of a call has the name of its function."""
    names: dict[str, Any] = {}
    found = []
    for message in messages:
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            calls = [_with_arguments(call) for call in calls]
            names |= {call["id"]: call["function"].get("name") for call in calls if "id" in call}
            message = {**message, "tool_calls": calls}
        if message.get("role") == "tool" and message.get("name") is None:
            name = names.get(str(message.get("tool_call_id")))
            message = {**message, "name": name}
        found.append(message)
    return found


def _with_arguments(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(call.get("id", ""), str):
        raise ValueError(f"a tool call must be an object with id and function, not {call!r:.60}")
    given = function.get("arguments")
    if isinstance(given, str):
        try:
            arguments = json.loads(given or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise ValueError(f"arguments of a tool call must be a JSON object, not {given!r:.60}")
        function = {**function, "arguments": arguments}
    return {**call, "function": function}


def _longest_prompt(engine: Engine, limits: Limits) -> int:
    """Returns the maximum number of tokens of a prompt."""
    most = engine.max_length - 1
    return most if limits.prompt_tokens is None else min(most, limits.prompt_tokens)


def _check_characters(engine: Engine, limits: Limits, value: Any, param: str) -> None:
    """Refuses a JSON value whose texts are too long for any tokens, because encoding a megabyte
    takes a second."""
    characters, most, left = 0, _longest_prompt(engine, limits), [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            characters += len(item)
        elif isinstance(item, dict):
            left += [*item, *item.values()]
        elif isinstance(item, list):
            left += item
    if characters > most * engine.longest:
        message = f"the prompt has {characters} characters, which are more than {most} tokens"
        raise BadRequest(message, param, "context_length_exceeded")


def _room(engine: Engine, limits: Limits, ids: Sequence[int], param: str) -> int:
    """Returns the number of new tokens for which a prompt leaves room."""
    most = _longest_prompt(engine, limits)
    if len(ids) > most:
        message = f"the prompt has {len(ids)} tokens; the limit is {most}"
        raise BadRequest(message, param, "context_length_exceeded")
    room = engine.max_length - len(ids)
    return room if limits.new_tokens is None else min(room, limits.new_tokens)


def _requests(
    engine: Engine, limits: Limits, body: Body, ids: list[int], new: int, options: dict[str, Any]
) -> list[Request]:
    if limits.new_tokens is not None and new > limits.new_tokens:
        raise BadRequest(
            f"max_tokens={new} is above the limit of {limits.new_tokens}", "max_tokens"
        )
    if len(ids) + new > engine.max_length:
        raise BadRequest(
            f"a prompt of {len(ids)} tokens and max_tokens={new} do not fit {engine.max_length}"
            " tokens",
            "max_tokens", "context_length_exceeded",
        )  # fmt: skip
    if body.top is not None and body.all_texts * new * (body.top + 1) > MAX_VALUES:
        message = f"{body.all_texts} texts of max_tokens={new} have more than {MAX_VALUES} values"
        raise BadRequest(f"{message}: ask for fewer", "logprobs")
    lengths = {"max_new_tokens": new, "max_time": limits.seconds}
    options = {**options, **_options(engine, body), **lengths}
    with _bad_requests(engine.tokenizer, None):
        return [
            engine.model.request(
                ids, seed=None if body.seed is None else seed_of(body.seed, number),
                logprobs=body.top, **options,
            )
            for number in range(body.texts)
        ]  # fmt: skip


def _options(engine: Engine, body: Body) -> dict[str, Any]:
    """Returns options of generate(): those of the body over those of the model's generation_config,
    if it samples, over OpenAI's defaults."""
    config = as_mapping(engine.model.generation_config)
    defaults = {k: v for k, v in config.items() if k in SAMPLING and v is not None}
    options: dict[str, Any] = {"do_sample": True, **SAMPLING}
    options |= defaults if config.get("do_sample") else {}
    named = {name: getattr(body, name) for name in (*SAMPLING, "repetition_penalty")}
    named["stop_strings"] = body.stop
    options |= {name: value for name, value in named.items() if value is not None}
    if body.logit_bias:
        size = engine.model.config.vocab_size
        options["sequence_bias"] = {(_token(k, size),): v for k, v in body.logit_bias.items()}
    return options


def _token(key: str, vocab_size: int) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", key) or int(key) >= vocab_size:
        message = f"logit_bias: {key!r:.60} is not a token id from 0 to {vocab_size - 1}"
        raise BadRequest(message, "logit_bias")
    return int(key)


@contextmanager
def _bad_requests(tokenizer: Tokenizer, param: str | None) -> Iterator[None]:
    """Turns errors of the library about its input into BadRequest, without paths of files."""
    try:
        yield
    except (ValueError, TypeError) as error:
        folder = Path(tokenizer.source).absolute().parent
        text = re.sub(rf"{re.escape(f'{folder}/')}[^\s:,]*", "the model", str(error))
        raise BadRequest(text, param) from None
