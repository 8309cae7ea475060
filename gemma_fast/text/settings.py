"""Reads the settings of a tokenizer from tokenizer_config.json and the files beside it, as
transformers' GemmaTokenizer does.

A key is applied (APPLIED, and each key that ends in _token), has no effect or is refused
(`keywords.SETTINGS`), or is unknown, which is a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from gemma_fast.checkpoint.hub import read_json
from gemma_fast.compat import check_keywords
from gemma_fast.text.batch import SIDES
from gemma_fast.text.gguf_vocab import MAX_ADDED
from gemma_fast.text.keywords import LOADING, SETTINGS
from gemma_fast.text.special_tokens import EXTRA, NAMED

NO_MAX_LENGTH = int(1e30)  # transformers' model_max_length of a tokenizer that has none
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# classes whose pipeline is defined by tokenizer.json
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
CLASSES = ("GemmaTokenizer", "GemmaTokenizerFast", *GENERIC)


def added_token(value: Any, special: bool = True) -> AddedToken:
    """Returns a token of a JSON file: a str, or an object with its content and flags. Raises
    ValueError for another value."""
    if isinstance(value, AddedToken):
        return value
    if isinstance(value, str) and value:
        return AddedToken(value, special=special)
    if isinstance(value, Mapping) and isinstance(value.get("content"), str) and value["content"]:
        flags = {name: bool(value[name]) for name in FLAGS if name in value}
        return AddedToken(value["content"], **({"special": special} | flags))
    raise ValueError("must be a token: a string, or an object with content")


def _limit(value: Any) -> None:
    if isinstance(value, Sized) and len(value) > MAX_ADDED:
        raise ValueError(f"must have at most {MAX_ADDED} tokens, not {len(value)}")


def _tokens(value: Any) -> Any:
    """Returns a list of tokens, or for an object a dict of named tokens."""
    _limit(value)
    if isinstance(value, Mapping) and "content" not in value:
        return {str(name): added_token(token) for name, token in value.items()}
    if isinstance(value, list | tuple):
        return [added_token(token) for token in value]
    raise ValueError("must be a list of tokens, or an object with named tokens")


def _decoder(value: Any) -> dict[int, AddedToken]:
    if not isinstance(value, Mapping) or not all(str(i).isdecimal() for i in value):
        raise ValueError("must be an object: id → token")
    _limit(value)
    return {int(i): added_token(token, special=False) for i, token in sorted(value.items())}


def _names(value: Any) -> list[str]:
    if not isinstance(value, list | tuple) or not all(isinstance(x, str) for x in value):
        raise ValueError("must be a list of strings")
    return [*value]


def _length(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError("must be a positive number")
    return int(min(value, NO_MAX_LENGTH))


def _side(value: Any) -> str:
    if value not in SIDES:
        raise ValueError(f"must be one of {SIDES}")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _class(value: Any) -> str:
    if value not in CLASSES:
        raise ValueError(
            f"must be one of {CLASSES}: for another tokenizer, use transformers.AutoTokenizer"
        )
    return value


def _unchanged(value: Any) -> Any:
    return value


APPLIED: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(NAMED, added_token),
    **dict.fromkeys(EXTRA, _tokens),
    "model_specific_special_tokens": _tokens,
    "added_tokens_decoder": _decoder,
    "add_bos_token": _flag,
    "add_eos_token": _flag,
    "chat_control_tokens": _names,
    "chat_template": _unchanged,  # checked in text/templates.py
    "fast_tokenizer_files": _names,
    "max_len": _length,
    "model_input_names": _names,
    "model_max_length": _length,
    "padding_side": _side,
    "tokenizer_class": _class,
    "truncation_side": _side,
}


def check_settings(given: Mapping[str, Any], source: str, *, call: bool = False) -> dict[str, Any]:
    """Returns the applied settings among `given`, without those that are None, except for tokens.

    call  `given` are keywords of a call, so an unknown one is a TypeError, not a warning
    """
    applied: dict[str, Any] = {}
    for name, value in given.items():
        if value is None or (name in LOADING and not call):
            if name in NAMED:  # null removes the default token, too
                applied[name] = None
            continue
        check = APPLIED.get(name)
        is_token = name.endswith("_token") and name not in SETTINGS
        if check is None and is_token and isinstance(value, str | dict | AddedToken):
            check = added_token
        if check is not None:
            try:
                applied[name] = check(value)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{source}: {name} is {value!r:.60}: it {error}") from None
        elif call or name in SETTINGS:
            try:
                check_keywords(source, {name: value}, SETTINGS)
            except TypeError as error:
                raise (error if call else ValueError(str(error))) from None
        else:
            warnings.warn(
                f"{source}: the key {name!r} is unknown and has no effect: if the tokenizer needs"
                " it, use transformers.AutoTokenizer",
                stacklevel=2,
            )
    files = applied.pop("fast_tokenizer_files", [])
    if set(files) - {"tokenizer.json"}:
        raise ValueError(
            f"{source}: fast_tokenizer_files is {files}: only tokenizer.json is read; rename the"
            " file for the newest version"
        )
    return applied


def read_settings(directory: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings in a model's directory. `given`, keywords of a call, override them."""
    config = directory / "tokenizer_config.json"
    has_json = (directory / "tokenizer.json").is_file()
    content = read_json(config) if config.is_file() else {}
    if has_json:  # its post-processor defines which tokens are added
        for name in ("add_bos_token", "add_eos_token"):
            content.pop(name, None)
    settings = check_settings(content, str(config))
    path = directory / "special_tokens_map.json"
    if "added_tokens_decoder" not in settings and path.is_file():
        settings |= check_settings(read_json(path), str(path))
    path = directory / "added_tokens.json"
    if "added_tokens_decoder" not in settings and path.is_file():
        settings["added_tokens_decoder"] = _read_added_tokens(path, settings)
    return settings | check_settings(given, "from_pretrained()", call=True)


def _read_added_tokens(path: Path, settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    named = {str(settings[name]) for name in NAMED if settings.get(name)}
    named |= {str(token) for name in EXTRA for token in settings.get(name, ())}
    ids = read_json(path)
    if len(ids) > MAX_ADDED or not all(isinstance(i, int) and t for t, i in ids.items()):
        raise ValueError(f"{path} must map at most {MAX_ADDED} tokens to ids, not {len(ids)}")
    return {
        i: AddedToken(token, normalized=token not in named, special=token in named)
        for token, i in sorted(ids.items(), key=lambda item: item[1])
    }


def add_settings_of(backend: Backend, settings: dict[str, Any]) -> None:
    """Adds what tokenizer.json says about padding and truncation, where `settings` do not."""
    if padding := backend.padding:
        if settings.get("tokenizer_class") in GENERIC:  # GemmaTokenizer has a pad token of its own
            settings.setdefault("pad_token", added_token(padding["pad_token"]))
        settings.setdefault("padding_side", padding["direction"])
    if truncation := backend.truncation:
        settings.setdefault("truncation_side", truncation["direction"])
