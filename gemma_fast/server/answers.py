"""The JSON objects of answers, in OpenAI's two shapes: completions and chats."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from gemma_fast.engine.logprobs import TokenLogprobs
from gemma_fast.server.choice import Delta
from gemma_fast.text.tokenizer import Tokenizer
from gemma_fast.text.tool_calls import ToolCall

LEAST = -9999.0  # OpenAI's log-probability of an impossible token, because JSON has no -inf
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def usage_of(prompt: int, new: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


class Answers(Protocol):
    """Builds the objects of one answer. whole: of complete choices. chunk: of a part of one."""

    def whole(self, choices: Sequence[Delta], usage: Any) -> dict[str, Any]: ...
    def chunk(self, delta: Delta | None, **more: Any) -> dict[str, Any]: ...


class _Head:
    """Fields of all objects of one answer."""

    kind = prefix = ""

    def __init__(self, model: str, tokenizer: Tokenizer) -> None:
        self._tokens = _Tokens(tokenizer)
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._model, self._created = model, int(time.time())

    def _object(self, kind: str, choices: list[Any], more: dict[str, Any]) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self._created, "model": self._model}
        return {**head, "choices": choices, **more}


class Completion(_Head):
    kind, prefix = "text_completion", "cmpl"

    def __init__(self, model: str, tokenizer: Tokenizer) -> None:
        super().__init__(model, tokenizer)
        self._characters: Counter[int] = Counter()  # in the scored tokens of each choice

    def whole(self, choices: Sequence[Delta], usage: Any) -> dict[str, Any]:
        return self._object(self.kind, [self._choice(x) for x in choices], {"usage": usage})

    def chunk(self, delta: Delta | None, **more: Any) -> dict[str, Any]:
        return self._object(self.kind, [self._choice(delta)] if delta else [], more)

    def _choice(self, delta: Delta) -> dict[str, Any]:
        return {
            "index": delta.number, "text": delta.text, "finish_reason": delta.finish,
            "logprobs": self._logprobs(delta) if delta.logprobs else None,
        }  # fmt: skip

    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        starts = []
        for token, _ in delta.logprobs:
            starts.append(self._characters[delta.number])
            self._characters[delta.number] += self._tokens.characters(token)
        return {
            "tokens": [self._tokens.text(token) for token, _ in delta.logprobs],
            "token_logprobs": [max(found.logprob, LEAST) for _, found in delta.logprobs],
            "top_logprobs": [
                {self._tokens.text(token): max(logprob, LEAST) for token, logprob in found.top}
                for _, found in delta.logprobs
            ],
            "text_offset": starts,
        }


class Chat(_Head):
    kind, prefix = "chat.completion", "chatcmpl"

    def whole(self, choices: Sequence[Delta], usage: Any) -> dict[str, Any]:
        return self._object(self.kind, [self._choice(x) for x in choices], {"usage": usage})

    def chunk(self, delta: Delta | None, **more: Any) -> dict[str, Any]:
        choices = [self._part(delta)] if delta else []
        return self._object(f"{self.kind}.chunk", choices, more)

    def _choice(self, delta: Delta) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": delta.text, "refusal": None}
        if delta.thought:
            message["reasoning_content"] = delta.thought
        if delta.calls:
            message["content"] = delta.text or None
            message["tool_calls"] = [_call(call) for call in delta.calls]
        return self._with_logprobs(delta, {"message": message})

    def _part(self, delta: Delta) -> dict[str, Any]:
        part: dict[str, Any] = {"role": "assistant", "content": ""} if delta.first else {}
        if delta.text:
            part["content"] = delta.text
        if delta.thought:
            part["reasoning_content"] = delta.thought
        if delta.calls:
            part["tool_calls"] = [
                {"index": delta.called + i, **_call(call)} for i, call in enumerate(delta.calls)
            ]
        return self._with_logprobs(delta, {"delta": part})

    def _with_logprobs(self, delta: Delta, fields: dict[str, Any]) -> dict[str, Any]:
        content = [
            {**self._tokens.scored(token, found.logprob), "top_logprobs": self._top(found)}
            for token, found in delta.logprobs
        ]
        logprobs = {"content": content, "refusal": None} if content else None
        return {
            "index": delta.number, **fields, "logprobs": logprobs, "finish_reason": delta.finish,
        }  # fmt: skip

    def _top(self, found: TokenLogprobs) -> list[dict[str, Any]]:
        return [self._tokens.scored(token, logprob) for token, logprob in found.top]


def _call(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    function = {"name": call.name, "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


class _Tokens:
    """Texts of single tokens. A token of one byte has OpenAI's text: bytes:\\xe2"""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def text(self, token: int) -> str:
        byte = self._byte(token)
        return self._tokenizer.decode([token]) if byte is None else f"bytes:\\x{byte:02x}"

    def characters(self, token: int) -> int:
        """Returns the number of characters that begin with a token: 0 for a special token, and for
        a byte inside a character."""
        byte = self._byte(token)
        if byte is not None:
            return int(byte & 0xC0 != 0x80)
        return len(self._tokenizer.decode([token], skip_special_tokens=True))

    def scored(self, token: int, logprob: float) -> dict[str, Any]:
        byte, text = self._byte(token), self.text(token)
        content: Iterable[int] = text.encode() if byte is None else [byte]
        return {"token": text, "logprob": max(logprob, LEAST), "bytes": [*content]}

    def _byte(self, token: int) -> int | None:
        found = BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(token) or "")
        return None if found is None else int(found[1], 16)
