"""Converts chat messages to one prompt in Gemma's chat format. Messages cannot add control tokens.

    <bos><start_of_turn>user\n{text}<end_of_turn>\n<start_of_turn>model\n

A message is {"role": "system" | "user" | "assistant", "content": text}. The role can also be
`model` instead of `assistant`, and the content a list of {"type": "text", "text": ...}.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

PRIVATE_USE = range(0xF0000, 0x10FFFE)

Message = dict[str, str]


class Template(Protocol):
    """Renders messages to one prompt. The attribute text is the template's source code, or "" if it
    has none."""

    @property
    def text(self) -> str: ...

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str: ...


@dataclass(frozen=True)
class GemmaTurns:
    """Renders the same text as the official templates of Gemma 1 and 2 (system_turn=False) and of
    Gemma 3 (system_turn=True)."""

    system_turn: bool
    text: str = ""

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """Returns the prompt. Raises ValueError if user and assistant do not alternate after an
        optional system turn."""
        prefix = ""
        if messages[0]["role"] == "system":
            if not self.system_turn:
                raise ValueError(
                    "message 0: Gemma 1 and 2 have no system turn; put its text into the first"
                    " user message"
                )
            prefix = messages[0]["content"] + "\n\n"
        turns = messages[1:] if prefix else messages
        if not turns:
            raise ValueError("there is no user turn after the system turn: add one")

        text = "<bos>"
        for i, message in enumerate(turns):
            role = "model" if message["role"] == "assistant" else message["role"]
            if role != ("user", "model")[i % 2]:
                raise ValueError(
                    f"message {i + len(messages) - len(turns)}: the role is {message['role']!r},"
                    " but user and assistant must alternate, user first"
                )
            text += f"<start_of_turn>{role}\n{prefix}{message['content'].strip()}<end_of_turn>\n"
            prefix = ""
        return text + ("<start_of_turn>model\n" if add_generation_prompt else "")


def check_messages(messages: object) -> list[Message]:
    """Returns the messages, with each content joined to one str. Raises ValueError, with the index
    of the message, for a malformed one."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages must be a list of at least one message, not {messages!r:.60}")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"message {i} must be a dict with role and content, not {message!r:.60}"
            )
        extra = [k for k, v in message.items() if k not in ("role", "content") and v is not None]
        if extra:
            raise ValueError(f"message {i}: {extra[0]!r} is not supported, only role and content")
        if not message["role"].isidentifier():  # control tokens in a role are not escaped
            raise ValueError(
                f"message {i}: {message['role']!r:.60} is not a role: use system, user or assistant"
            )
        checked.append({"role": message["role"], "content": _content(message.get("content"), i)})
    return checked


def _content(content: object, i: int) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or not content:
        raise ValueError(f"message {i}: content must be text, not {content!r:.60}")
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise ValueError(f"message {i}: only text is supported, not {kind!r:.60}")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"message {i}: text must be a str, not {part.get('text')!r:.60}")
        texts.append(part["text"])
    # Gemma 3's template strips each part, so several parts are stripped before they are joined. A
    # single part is not stripped here, because the template may strip it.
    return texts[0] if len(texts) == 1 else "".join(text.strip() for text in texts)


def render_pieces(
    template: Template,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    find_control_tokens: Callable[[str], Iterable[tuple[int, int]]],
) -> list[str]:
    """Renders the prompt, and splits it at each control token that came from a message.

    Returns the pieces. Pieces 1, 3, 5, … are the control tokens, which must be encoded as plain
    text. While the template runs, one private-use character replaces each of these tokens, so the
    template can move or drop a token, but cannot split it. (A template could still build a control
    token if it joined halves from two messages; no known template joins messages directly.)
    """
    taken = set(template.text).union(*(message["content"] for message in messages))
    free = (char for char in map(chr, PRIVATE_USE) if char not in taken)
    marks: dict[str, str] = {}  # token → the character that replaces it

    def mark(text: str) -> str:
        parts, end = [], 0
        for start, stop in find_control_tokens(text):
            token = text[start:stop]
            if token not in marks:
                marks[token] = next(free, "")
                if not marks[token]:
                    raise ValueError(
                        "messages and template use all private-use characters, but one must be free"
                    )
            parts += [text[end:start], marks[token]]
            end = stop
        return "".join(parts) + text[end:]

    marked = [message | {"content": mark(message["content"])} for message in messages]
    rendered = template.render(marked, add_generation_prompt)
    if not marks:
        return [rendered]
    tokens = {char: token for token, char in marks.items()}
    return [tokens.get(piece, piece) for piece in re.split(f"([{''.join(tokens)}])", rendered)]
