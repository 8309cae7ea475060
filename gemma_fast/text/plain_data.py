"""Copies the variables of a chat template (messages, tools, documents and others) to plain JSON
values, and marks control tokens in them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MAX_DEPTH = 64
MAX_ITEMS = 200_000
MAX_CHARACTERS = 4 << 20  # about a million tokens
MAX_BITS = 4096  # of an integer
PRIVATE_USE = range(0xF0000, 0x10FFFE)


def plain(value: Any, name: str) -> Any:
    """Returns a copy of `value` that consists of dict, list, str, int, float, bool and None.

    Dataclasses, and objects with `model_dump` such as pydantic's, become dicts. Raises ValueError,
    with `name`, for other objects, for keys that are not str, and for data that are too large or
    nested too deeply, such as a list that contains itself.
    """
    left = itertools.count(1), [MAX_CHARACTERS]
    return _plain(value, name, 0, *left)


def _plain(value: Any, name: str, depth: int, items: Iterator[int], characters: list[int]) -> Any:
    if next(items) > MAX_ITEMS:
        raise ValueError(f"{name}: more than {MAX_ITEMS} values; pass fewer")
    if depth > MAX_DEPTH:
        raise ValueError(f"{name}: nested more than {MAX_DEPTH} levels deep, or contains itself")
    if isinstance(value, str):
        characters[0] -= len(value)
        if characters[0] < 0:
            raise ValueError(f"{name}: more than {MAX_CHARACTERS} characters; pass fewer")
        return str.__str__(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and value.bit_length() <= MAX_BITS:
        return int(value)
    if isinstance(value, float):
        return float(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif callable(getattr(value, "model_dump", None)):
        value = value.model_dump()
    elif getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        return _plain(value.item(), name, depth + 1, items, characters)  # a scalar of NumPy
    if isinstance(value, Mapping):
        if bad := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"{name}: keys must be str, not {bad[0]!r:.60}: convert them")
        pairs = ((key, _plain(key, name, depth, items, characters)) for key in value)
        return {text: _plain(value[key], name, depth + 1, items, characters) for key, text in pairs}
    if isinstance(value, list | tuple):
        return [_plain(item, name, depth + 1, items, characters) for item in value]
    raise ValueError(
        f"{name}: a {type(value).__name__} is not JSON: convert it to text, a number, a list or a"
        " dict"
    )


class Marks:
    """Replaces each control token in values by one private-use character, so that a template can
    move or drop the token, but cannot split it.

    (A template could still build a control token if it joined halves from two values; no known
    template joins values directly.)
    """

    def __init__(self, taken: str, control_tokens: Iterable[str]) -> None:
        """taken  a text with all characters that cannot be used as marks"""
        self._taken = set(taken)
        self._free = (char for char in map(chr, PRIVATE_USE) if char not in self._taken)
        self._tokens = {*control_tokens}
        self._lengths = sorted({len(token) for token in self._tokens}, reverse=True)
        first = "".join({token[0] for token in self._tokens})
        self._first = re.compile(f"[{re.escape(first)}]" if first else "(?!)")
        self._marks: dict[str, str] = {}  # token → the character that replaces it

    def new(self) -> str:
        """Returns a private-use character that is not used elsewhere."""
        char = next(self._free, "")
        if not char:
            raise ValueError(
                "messages and template use all private-use characters, but one must be free"
            )
        return char

    def mark(self, value: Any) -> Any:
        """Returns a copy of a plain value with marks in all its strings, keys included."""
        if isinstance(value, str):
            return self._mark(value)
        if isinstance(value, dict):
            return {self._mark(key): self.mark(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.mark(item) for item in value]
        return value

    def _mark(self, text: str) -> str:
        parts, end = [], 0
        for match in self._first.finditer(text):
            start = match.start()
            found = (text[start : start + length] for length in self._lengths)
            token = next((x for x in found if x in self._tokens), "") if start >= end else ""
            if token:
                if token not in self._marks:
                    self._marks[token] = self.new()
                parts += [text[end:start], self._marks[token]]
                end = start + len(token)
        return "".join(parts) + text[end:]

    def split(self, text: str) -> list[tuple[str, str]]:
        """Splits a rendered text at its marks. Returns the pieces as they stand in `text`, each
        with the control token that it stands for, or with ""."""
        tokens = {char: token for token, char in self._marks.items()}
        # A template's tojson(ensure_ascii=True) writes a mark as an escape sequence.
        tokens |= {json.dumps(char)[1:-1]: token for char, token in tokens.items()}
        if not tokens:
            return [(text, "")]
        pieces = re.split(f"({'|'.join(map(re.escape, tokens))})", text)
        return [(piece, tokens[piece] if i % 2 else "") for i, piece in enumerate(pieces)]
