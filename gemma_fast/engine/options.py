"""The options of generate(), in three levels: keywords of the call override its generation_config,
which overrides the model's generation_config. compat.py lists the options of transformers.

As in transformers, a keyword that is None switches the option off, even if a generation_config sets
it. An option that is None in a generation_config is not set.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from gemma_fast.compat import APPLIED, GENERATION_CONFIG, check_keywords
from gemma_fast.config import GemmaConfig


class _Unset:
    def __repr__(self) -> str:
        return "UNSET"


UNSET: Any = _Unset()  # default value of the keywords of generate(), which differs from None


class GenerationConfig(dict[str, Any]):
    """Stores default options of `generate`, as in generation_config.json. Items are attributes too.

    An option that is not set is None. Setting an option that `generate` does not support raises
    TypeError, which names an alternative. Warnings name `source`.
    """

    source = "the model"

    @classmethod
    def of(cls, options: Mapping[str, Any], source: str) -> GenerationConfig:
        """Returns the options that `source`, a file or a model, sets."""
        config = cls(options)
        object.__setattr__(config, "source", source)
        return config

    @classmethod
    def of_model(cls, config: GemmaConfig) -> GenerationConfig:
        """Returns the options of a model without generation_config.json: the ids of its config."""
        eos = None if config.eos_token_id == () else config.eos_token_id
        return cls(eos_token_id=eos, pad_token_id=config.pad_token_id)

    def __getattr__(self, name: str) -> Any:
        if name in GENERATION_CONFIG or name in self:
            return self.get(name)
        options = ", ".join(APPLIED)
        raise AttributeError(f"a GenerationConfig has no option {name!r}, only {options}")

    def __setattr__(self, name: str, value: Any) -> None:
        check_keywords("generation_config", {name: value}, GENERATION_CONFIG)
        self[name] = value

    def to_dict(self) -> dict[str, Any]:
        return dict(self)


def merge_options(
    keywords: Mapping[str, Any], generation_config: Any, defaults: Any
) -> dict[str, Any]:
    """Returns the options of compat.APPLIED that are not None. keywords that are not UNSET override
    generation_config, which overrides defaults, the model's generation_config.

    Raises TypeError for an option in generation_config that is not supported. Warns of one in
    defaults, because the model of a checkpoint must load.
    """
    source = f"generation_config of {getattr(defaults, 'source', 'the model')}"
    passed, defaults = as_mapping(generation_config), as_mapping(defaults)
    check_keywords("generation_config", _given(passed), GENERATION_CONFIG)
    for name, value in _given(defaults).items():
        try:
            if name not in GENERATION_CONFIG:
                raise TypeError(f"{source}: {name}={value!r:.60} is unknown: remove it")
            check_keywords(source, {name: value}, GENERATION_CONFIG)
        except TypeError as problem:
            warnings.warn(f"{problem}; it is ignored", stacklevel=3)
    called = {name: value for name, value in keywords.items() if value is not UNSET}
    if called.get("top_k", 0) is None:
        called["top_k"] = 0  # all tokens, not the default
    merged = {**_given(defaults), **_given(passed), **called}
    return {name: merged[name] for name in APPLIED if merged.get(name) is not None}


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def as_mapping(config: Any) -> Mapping[str, Any]:
    if config is None or isinstance(config, Mapping):
        return config or {}
    if not callable(getattr(config, "to_dict", None)):
        raise ValueError(
            f"generation_config must be a GenerationConfig or a dict, not {config!r:.60}"
        )
    return config.to_dict()
