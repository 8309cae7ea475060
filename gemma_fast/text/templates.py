"""Finds the chat templates of a checkpoint in the same files as transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_fast.text.jinja_template import MAX_LENGTH

FOLDER = "additional_chat_templates"
MAX_TEMPLATES = 64
PASSED = "the chat_template that was passed"
Templates = str | dict[str, str] | None  # one template, or several by name


def read_templates(directory: Path) -> tuple[Templates, str]:
    """Returns the templates in the .jinja files of a directory and the path of the first one. They
    take priority over those in tokenizer_config.json. Returns None if there are none."""
    paths = {"default": directory / "chat_template.jinja"}
    paths |= {path.stem: path for path in sorted((directory / FOLDER).glob("*.jinja"))}
    found = {name: path for name, path in paths.items() if path.is_file()}
    if not found:
        return None, str(directory / "tokenizer_config.json")
    source = str(next(iter(found.values())))
    if len(found) > MAX_TEMPLATES:
        raise ValueError(f"{directory / FOLDER}: {len(found)} templates; at most {MAX_TEMPLATES}")
    texts: dict[str, str] = {}
    for name, path in found.items():
        with path.open(encoding="utf-8", errors="replace", newline=None) as file:
            texts[name] = _checked(file.read(MAX_LENGTH + 1), str(path))
    return (texts["default"] if [*texts] == ["default"] else texts), source


def check_templates(value: Any, source: str) -> Templates:
    """Returns a template, or templates by name: a dict, or tokenizer_config.json's list of objects
    with name and template. Raises ValueError for another value."""
    if value is None or isinstance(value, str):
        return value and _checked(value, source)
    if isinstance(value, list | tuple):
        if not all(isinstance(x, Mapping) and isinstance(x.get("name"), str) for x in value):
            raise ValueError(f"{source}: each template in chat_template must have a name")
        value = {x["name"]: x.get("template") for x in value}
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{source}: the chat template must be a string or named strings, not {value!r:.60}"
        )
    return {str(name): _checked(text, f"{source}, {name}") for name, text in value.items()}


def gguf_templates(metadata: Mapping[str, Any], source: str) -> Templates:
    """Returns the templates in a GGUF file's metadata."""
    key = "tokenizer.chat_template"
    default = check_templates(metadata.get(key), f"{source}: {key}")
    named = {
        name.removeprefix(f"{key}."): text
        for name, text in metadata.items()
        if name.startswith(f"{key}.")
    }
    if not named:
        return default
    found = {"default": default, **named} if default is not None else named
    return check_templates(found, f"{source}: {key}")


def choose_template(
    templates: Templates, wanted: str | None, tools: Any, source: str
) -> tuple[str, str]:
    """Returns the template that transformers would choose, and its source for error messages.
    `wanted` is a template or the name of one. Without it, that for tools, or the default one."""
    if wanted is not None:
        named = templates.get(wanted) if isinstance(templates, dict) else None
        return (named, source) if named else (_checked(wanted, PASSED), PASSED)
    if not isinstance(templates, dict):
        if templates is None:
            raise ValueError(
                f"{source} has no chat template: pass chat_template=…, or set the attribute"
                " chat_template"
            )
        return templates, source
    names = ("tool_use", "default") if tools is not None else ("default",)
    for name in names:
        if name in templates:
            return templates[name], source
    raise ValueError(
        f"{source} has several chat templates and no default one: pass chat_template=… with one of"
        f" {sorted(templates)}"
    )


def _checked(template: Any, source: str) -> str:
    if not isinstance(template, str) or len(template) > MAX_LENGTH:
        raise ValueError(
            f"{source}: the chat template must be a string of at most {MAX_LENGTH} characters"
        )
    return template
