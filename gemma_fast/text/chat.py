"""Chat messages → one prompt in Gemma's turns. A message cannot contain a control token.

    <bos><start_of_turn>user\n{text}<end_of_turn>\n<start_of_turn>model\n

A message is {"role": "system" | "user" | "assistant", "content": text}. The role may also be
`model` instead of `assistant`, and content a list of {"type": "text", "text": ...}.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

PRIVATE_USE = range(0xF0000, 0x10FFFE)

Message = dict[str, str]


class Template(Protocol):
    """Renders messages as one text. `text` is the template's source."""

    @property
    def text(self) -> str: ...

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str: ...


@dataclass(frozen=True)
class GemmaTurns:
    """The official turns of Gemma 1 and 2 (without a system turn) and of Gemma 3 (with one)."""

    system_turn: bool
    text: str = ""

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """ValueError unless user and assistant alternate, after an optional system turn."""
        prefix = ""
        if messages[0]["role"] == "system":
            if not self.system_turn:
                raise ValueError(
                    "message 0: Gemma 1 and 2 have no system turn; put it into the first user turn"
                )
            prefix = messages[0]["content"] + "\n\n"
        turns = messages[1:] if prefix else messages
        if not turns:
            raise ValueError("the system turn has no user turn after it to be put into")

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
    """The messages, each content joined to one str. ValueError, with the message, if malformed."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages must be a list of at least one message, not {messages!r:.60}")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {i} is no dict with a role and a content: {message!r:.60}")
        extra = [k for k, v in message.items() if k not in ("role", "content") and v is not None]
        if extra:
            raise ValueError(f"message {i}: {extra[0]!r} is not supported, only role and content")
        if not message["role"].isidentifier():  # it is not escaped
            raise ValueError(f"message {i}: {message['role']!r:.60} is no role")
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
    # Gemma 3's template trims each part. A single part is trimmed, or not, with its turn.
    return texts[0] if len(texts) == 1 else "".join(text.strip() for text in texts)


def render_pieces(
    template: Template,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    find_control_tokens: Callable[[str], Iterable[tuple[int, int]]],
) -> list[str]:
    """The rendered prompt, split at each control token that came from a message.

    Pieces 1, 3, 5, … are those tokens, to be encoded as plain text. While the template runs, a
    private character stands for each: the template can move or drop it, but not split it. (It could
    still build a token from the halves in two messages, if it joined them directly; no known
    template does.)
    """
    taken = set(template.text).union(*(message["content"] for message in messages))
    free = (char for char in map(chr, PRIVATE_USE) if char not in taken)
    marks: dict[str, str] = {}  # token → the character that stands for it

    def mark(text: str) -> str:
        parts, end = [], 0
        for start, stop in find_control_tokens(text):
            token = text[start:stop]
            if token not in marks:
                marks[token] = next(free, "")
                if not marks[token]:
                    raise ValueError("the messages leave no private character to use as a mark")
            parts += [text[end:start], marks[token]]
            end = stop
        return "".join(parts) + text[end:]

    marked = [message | {"content": mark(message["content"])} for message in messages]
    rendered = template.render(marked, add_generation_prompt)
    if not marks:
        return [rendered]
    tokens = {char: token for token, char in marks.items()}
    return [tokens.get(piece, piece) for piece in re.split(f"([{''.join(tokens)}])", rendered)]
