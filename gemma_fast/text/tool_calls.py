"""Reads the tool calls that a Gemma 4 writes, in the format of its chat template:

<|tool_call>call:weather{place:<|"|>Oslo<|"|>,days:[1,2],metric:true}<tool_call|>
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NamedTuple

CALL, END_CALL, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
MAX_DEPTH = 64
_NAME = re.compile(r"\s*call:([\w.-]+)(?=\{)")
_KEY = re.compile(r"[^:{}\[\],]+")
_WORD = re.compile(r"[^{}\[\],:\s]+")
_SPACE = re.compile(r"\s*")
_WORDS = {"true": True, "false": False, "null": None, "None": None}


class ToolCall(NamedTuple):
    """name  of the function; arguments  plain JSON"""

    name: str
    arguments: dict[str, Any]


def read_tool_call(text: str) -> ToolCall | None:
    """Returns the call in `text`, which stands between <|tool_call> and <tool_call|>, or None if it
    does not have the format."""
    name = _NAME.match(text)
    if name is None:
        return None
    try:
        reader = _Reader(text, name.end())
        arguments = reader.value(0)
        reader.skip_space()
    except ValueError:
        return None
    if reader.at != len(text) or not isinstance(arguments, dict):
        return None
    return ToolCall(name[1], arguments)


class _Reader:
    """Reads values from position `at` of a text. Raises ValueError for text without the format."""

    def __init__(self, text: str, at: int) -> None:
        self.text, self.at = text, at

    def value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError("too deep")
        self.skip_space()
        if self._found(QUOTE):
            return self._string()
        if self._found("{"):
            return dict(self._items("}", lambda: self._pair(depth)))
        if self._found("["):
            return self._items("]", lambda: self.value(depth + 1))
        word = self._match(_WORD)
        return _WORDS[word] if word in _WORDS else _number(word)

    def skip_space(self) -> None:
        self._match(_SPACE)

    def _pair(self, depth: int) -> tuple[str, Any]:
        key = self._string() if self._found(QUOTE) else self._match(_KEY).strip()
        self._expect(":")
        return key, self.value(depth + 1)

    def _items(self, end: str, item: Any) -> list[Any]:
        items: list[Any] = []
        self.skip_space()
        while not self._found(end):
            if items:
                self._expect(",")
                self.skip_space()
            items.append(item())
            self.skip_space()
        return items

    def _string(self) -> str:
        start, end = self.at, self.text.find(QUOTE, self.at)
        if end < 0:
            raise ValueError("the string does not end")
        self.at = end + len(QUOTE)
        return self.text[start:end]

    def _found(self, mark: str) -> bool:
        found = self.text.startswith(mark, self.at)
        self.at += len(mark) if found else 0
        return found

    def _expect(self, mark: str) -> None:
        if not self._found(mark):
            raise ValueError(f"no {mark}")

    def _match(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self.text, self.at)
        if found is None:
            raise ValueError("no value")
        self.at = found.end()
        return found[0]


def _number(word: str) -> int | float:
    number = json.loads(word, parse_constant=_refuse)
    if not isinstance(number, int | float) or not math.isfinite(number):
        raise ValueError(word)
    return number


def _refuse(word: str) -> None:
    raise ValueError(word)
