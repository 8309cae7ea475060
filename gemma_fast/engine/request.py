"""What `generate` was asked for: its keywords, over its generation_config, over the model's.

ValueError: a value that cannot be meant, named with what is allowed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma_fast.compat import GENERATE, check_keywords

if TYPE_CHECKING:
    from gemma_fast.config import GemmaConfig

SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
LENGTHS = ("max_new_tokens", "max_length")
UNASKED = 20  # tokens, as in transformers, whose examples of Gemma count on it
OPTIONS = (*SAMPLING, *LENGTHS, "eos_token_id", "pad_token_id", "stop_strings")


class GenerationConfig(dict[str, Any]):
    """`generate`'s defaults, as in generation_config.json; items are attributes too.

    An option that is not set is None. Setting one that generate does not have is a TypeError.
    """

    def __getattr__(self, name: str) -> Any:
        if name in OPTIONS or name in self:
            return self.get(name)
        raise AttributeError(f"generate has no option {name!r}, only {', '.join(OPTIONS)}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in OPTIONS:
            check_keywords("generation_config", {name: value}, GENERATE)
        self[name] = value


def choose_options(
    keywords: Mapping[str, Any], config: Any, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """The options that are set. `config` is None, a mapping or transformers' GenerationConfig."""
    passed = _as_mapping(config)
    for name, value in defaults.items():
        if name in GENERATE:
            try:
                check_keywords("the model's generation_config", {name: value}, GENERATE)
            except TypeError as problem:
                warnings.warn(f"{problem}; it is left out", stacklevel=4)
    unknown = {k: v for k, v in passed.items() if k not in (*OPTIONS, *_ABOUT) and v is not None}
    check_keywords("generation_config", unknown, GENERATE)
    levels = (keywords, passed, defaults)
    values = {k: [level[k] for level in levels if level.get(k) is not None] for k in OPTIONS}
    return {k: value[0] for k, value in values.items() if value}


def new_tokens(prompt: int, options: Mapping[str, Any], context: int) -> int:
    """How many tokens at most follow a prompt of so many: max_new_tokens, wherever it is set, goes
    before max_length, as in transformers. A warning: nobody said."""
    name = next((name for name in LENGTHS if name in options), None)
    if name is None:
        warnings.warn(f"pass max_new_tokens: without it, {UNASKED} are written", stacklevel=4)
        given, name = max(min(UNASKED, context - prompt), 1), "max_new_tokens"
    else:
        given = options[name]
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ValueError(f"{name}={given!r} must be a whole number from 1")
    new = given if name == "max_new_tokens" else given - prompt
    if new < 1:
        raise ValueError(f"{name}={given} counts the prompt, which has {prompt} tokens already")
    if prompt + new > context:
        raise ValueError(
            f"a prompt of {prompt} tokens and max_new_tokens={new} do not fit the model's context "
            f"of {context}"
        )
    return new


def token_ids(name: str, options: Mapping[str, Any], config: GemmaConfig) -> list[int]:
    """The ids that an option, or else the model's config, names."""
    given = options.get(name, getattr(config, name))
    ids = given.tolist() if isinstance(given, Tensor) else given
    ids = list(ids) if isinstance(ids, list | tuple) else [ids]
    for token in ids:
        whole = isinstance(token, int) and not isinstance(token, bool)
        if not (whole and 0 <= token < config.vocab_size):
            raise ValueError(f"{name}={given!r} must be ids below {config.vocab_size}")
    return ids


def check_mask(mask: Any, ids: Tensor) -> None:
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    if shape != ids.shape:
        raise ValueError(f"attention_mask must be a tensor of {tuple(ids.shape)}, not {shape}")
    real = mask.bool()
    if not real[:, -1].all():
        raise ValueError("prompts must be padded on the left: each row of the mask must end in 1")
    if (real[:, :-1] & ~real[:, 1:]).any():
        raise ValueError("attention_mask has holes: only padding on one side is supported")


def choose_seed(seed: Any, do_sample: bool) -> int:
    """`seed`, or one from torch's global generator where tokens are drawn."""
    if seed is None:
        return int(torch.randint(1 << 62, (), device="cpu")) if do_sample else 0
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        raise ValueError(f"seed={seed!r} must be a whole number from 0, below 2**63")
    return seed


_ABOUT = ("transformers_version", "_from_model_config")  # how a config was made


def _as_mapping(config: Any) -> Mapping[str, Any]:
    if config is None or isinstance(config, Mapping):
        return config or {}
    if not callable(getattr(config, "to_dict", None)):
        raise ValueError(f"generation_config must be one, or a dict, not {config!r:.60}")
    return config.to_dict()
