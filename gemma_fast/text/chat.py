"""Converts chat messages to one prompt, in which messages cannot add control tokens.

GemmaTurns renders Gemma's chat format for checkpoints without a template:

    <bos><start_of_turn>user\n{text}<end_of_turn>\n<start_of_turn>model\n

A message is {"role": "system" | "user" | "assistant", "content": text}. The role can also be
`model` instead of `assistant`, and the content a list of {"type": "text", "text": ...}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from gemma_fast.text.jinja_template import Rendered
from gemma_fast.text.plain_data import Marks, plain

Message = dict[str, Any]
ROLE = re.compile(r"[\w.-]+")
MEDIA = ("image", "image_url", "audio", "input_audio", "video", "video_url")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field of a message
OPEN, CLOSE = "<|channel>", "<channel|>"  # around the thoughts of Gemma 4
DROPS_THOUGHTS = re.compile(r"""split\(\s*(['"])<channel\|>\1\s*\)""")
PASS_TEMPLATE = "pass chat_template=…"


class Template(Protocol):
    """Renders variables, which are plain JSON, to a prompt. The attribute text is the template's
    source code, or "" if it has none."""

    @property
    def text(self) -> str: ...

    def render(self, variables: Mapping[str, Any]) -> Rendered: ...


@dataclass(frozen=True)
class GemmaTurns:
    """Renders the same text as the official templates of Gemma 1 and 2 (system_turn=False) and of
    Gemma 3 (system_turn=True)."""

    system_turn: bool
    text: str = ""

    def render(self, variables: Mapping[str, Any]) -> Rendered:
        """Returns the prompt. Raises ValueError if user and assistant do not alternate after an
        optional system turn, and for anything else that the format has no place for."""
        for name, value in variables.items():
            known = name in ("messages", "add_generation_prompt") or name.endswith("_token")
            if value is not None and not known:
                raise ValueError(f"{name}: Gemma's turns have no place for it: {PASS_TEMPLATE}")
        messages = [_text_message(m, i) for i, m in enumerate(variables["messages"])]
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

        text = variables.get("bos_token") or ""
        for i, message in enumerate(turns):
            role = "model" if message["role"] == "assistant" else message["role"]
            if role != ("user", "model")[i % 2]:
                raise ValueError(
                    f"message {i + len(messages) - len(turns)}: the role is {message['role']!r},"
                    f" but user and assistant must alternate, user first; or {PASS_TEMPLATE}"
                )
            text += f"<start_of_turn>{role}\n{prefix}{message['content'].strip()}<end_of_turn>\n"
            prefix = ""
        add = variables["add_generation_prompt"]
        return Rendered(text + ("<start_of_turn>model\n" if add else ""), [])


def _text_message(message: Message, i: int) -> dict[str, str]:
    """Returns the message with its parts joined into one text."""
    extra = [k for k in message if k not in ("role", "content")]
    if extra:
        raise ValueError(
            f"message {i}: {extra[0]!r} is not supported by Gemma's turns, only role and content:"
            f" {PASS_TEMPLATE}"
        )
    content = message.get("content")
    if isinstance(content, str):
        return {"role": message["role"], "content": content}
    if not isinstance(content, list) or not content:
        raise ValueError(f"message {i}: content must be text, not {content!r:.60}")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ValueError(f"message {i}: only text is supported, not {part!r:.60}")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"message {i}: text must be a str, not {part.get('text')!r:.60}")
        if more := part.keys() - {"type", "text"}:
            raise ValueError(
                f"message {i}: {min(more)!r} is not supported by Gemma's turns: {PASS_TEMPLATE}"
            )
    texts = [part["text"] for part in content]
    # Gemma 3's template strips each part, so several parts are stripped before they are joined. A
    # single part is not stripped here, because the format strips it.
    joined = texts[0] if len(texts) == 1 else "".join(text.strip() for text in texts)
    return {"role": message["role"], "content": joined}


def check_messages(messages: object) -> list[Message]:
    """Returns the messages as plain JSON, without keys whose value is None, and with a message's
    reasoning under each name that templates use, as transformers does. Raises ValueError, with the
    index of the message, for a malformed one."""
    messages = getattr(messages, "messages", messages)
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages must be a list of at least one message, not {messages!r:.60}")
    checked = []
    for i, message in enumerate(plain(list(messages), "messages")):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"message {i} must be a dict with role and content, not {message!r:.60}"
            )
        if not ROLE.fullmatch(message["role"]):  # control tokens in a role are not escaped
            raise ValueError(
                f"message {i}: {message['role']!r:.60} is not a role: use system, user or assistant"
            )
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") in MEDIA:
                raise ValueError(f"message {i}: only text is supported, not {part['type']!r:.60}")
        message = {key: value for key, value in message.items() if value is not None}
        reasoning = [message[key] for key in REASONING if key in message]
        if reasoning:
            message = {"thinking": reasoning[0], **message, "reasoning_content": reasoning[0]}
        checked.append(message)
    return checked


def check_tools(tools: object) -> list[Any] | None:
    """Returns tools as plain JSON. Raises ValueError for functions."""
    if tools is None:
        return None
    if not isinstance(tools, list | tuple):
        raise ValueError(f"tools must be a list of JSON schemas, not {tools!r:.60}")
    for tool in tools:
        if callable(tool) and not callable(getattr(tool, "model_dump", None)):
            name = getattr(tool, "__name__", "function")
            raise ValueError(
                f"tools contains the function {name}: pass its JSON schema, which"
                f" transformers.utils.get_json_schema({name}) returns"
            )
        if not isinstance(tool, Mapping):
            raise ValueError(f"a tool must be a dict with its JSON schema, not {tool!r:.60}")
    return plain(list(tools), "tools")


class Prompt(NamedTuple):
    """pieces  parts of the rendered text, each with the control token that it stands for, or ""
    spans      start and stop of `{% generation %}` blocks, in characters of the joined pieces"""

    pieces: list[tuple[str, str]]
    spans: list[list[int]]

    @property
    def text(self) -> str:
        return "".join(token or piece for piece, token in self.pieces)


def render_prompt(
    template: Template,
    variables: Mapping[str, Any],
    control_tokens: Iterable[str],
    trusted: Mapping[str, str],
    continue_final_message: bool | str = False,
) -> Prompt:
    """Renders the prompt, in which each control token that came from `variables` has a piece of its
    own. These pieces must be encoded as plain text.

    trusted                 the names and texts of special tokens, for the template
    continue_final_message  the prompt ends with the last message's content, or with the field of
                            this name
    """
    control_tokens = {*control_tokens}
    if CLOSE in control_tokens and DROPS_THOUGHTS.search(template.text):
        messages = [_without_thoughts(message) for message in variables["messages"]]
        variables = {**variables, "messages": messages}
    taken = template.text + json.dumps([variables, dict(trusted)], ensure_ascii=False)
    marks = Marks(taken, control_tokens)
    marked = {**trusted, **{name: marks.mark(value) for name, value in variables.items()}}
    if not continue_final_message:
        rendered = template.render(marked)
        return Prompt(marks.split(rendered.text), rendered.spans)
    field = continue_final_message if isinstance(continue_final_message, str) else "content"
    end = marks.new()
    final = _append(marked["messages"][-1], field, end + " ", template.text)
    text = template.render(marked).text
    if final.strip() not in text or end not in text:
        raise ValueError(
            f"continue_final_message: the template drops or changes the {field} of the final"
            " message, so it cannot be continued"
        )
    text, _, rest = text.rpartition(end)
    text = text if rest.startswith(" ") else text.rstrip()
    return Prompt(marks.split(text.replace(end, "")), [])  # a template may repeat the field


def _without_thoughts(message: Message) -> Message:
    """Returns an earlier answer without its thoughts, as the template would, which cannot find
    their control tokens once these are marked."""
    if message["role"] not in ("assistant", "model"):
        return message
    if isinstance(content := message.get("content"), str):
        return {**message, "content": _drop_thoughts(content)}
    parts = [
        {**part, "text": _drop_thoughts(part["text"])}
        if isinstance(part, dict) and isinstance(part.get("text"), str)
        else part
        for part in (content if isinstance(content, list) else [])
    ]
    return {**message, "content": parts} if parts else message


def _drop_thoughts(text: str) -> str:
    return "".join(part.partition(OPEN)[0] for part in text.split(CLOSE))


def _append(message: Message, field: str, end: str, template: str) -> str:
    """Appends `end` to the text of a field of a message, in place. Returns the text before."""
    value = message.get(field)
    names = [field]
    if field in REASONING:
        names = [name for name in REASONING if message.get(name) == value]
    if template and not any(name in template for name in names):
        raise ValueError(f"continue_final_message: the chat template has no field {field!r}")
    if isinstance(value, str):
        for name in names:
            message[name] = value + end
        return value
    for part in reversed(value if isinstance(value, list) else []):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            text, part["text"] = part["text"], part["text"] + end
            return text
    raise ValueError(f"continue_final_message: the final message has no {field} with text")
