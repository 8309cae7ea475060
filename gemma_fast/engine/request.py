"""`Request` is one prompt to continue, with its settings. `requests_of` creates the requests of a
call of generate().

The call's keywords override its generation_config, which overrides the model's generation_config. A
value out of range raises ValueError, which names the value and the allowed values.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gemma_fast.compat import GENERATE, check_keywords
from gemma_fast.config import GemmaConfig
from gemma_fast.engine.sampling import Sampling
from gemma_fast.model.padding import check_shape, left_padding

SETTINGS = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
LENGTHS = ("max_new_tokens", "max_length")
DEFAULT_NEW_TOKENS = 20  # transformers' default, on which its Gemma examples rely
OPTIONS = (*SETTINGS, *LENGTHS, "eos_token_id", "pad_token_id", "stop_strings")


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A prompt to continue, and the settings for its text.

    ids             [t], int64: left padding, then the prompt; t is equal in all requests of a call
    padding         number of padding ids on the left
    sampling        sampling settings
    max_new_tokens  maximum number of new tokens
    eos_token_ids   tokens that end the text
    stop_strings    strings that end the text when they appear in its generated part
    pad_token_id    fills the row after the text has ended
    """

    ids: Tensor
    padding: int
    sampling: Sampling
    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    pad_token_id: int


class GenerationConfig(dict[str, Any]):
    """Stores default options of `generate`, as in generation_config.json. Items are attributes too.

    An option that is not set is None. Setting an option that generate does not have raises
    TypeError.
    """

    def __getattr__(self, name: str) -> Any:
        if name in OPTIONS or name in self:
            return self.get(name)
        raise AttributeError(f"generate has no option {name!r}, only {', '.join(OPTIONS)}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in OPTIONS:
            check_keywords("generation_config", {name: value}, GENERATE)
        self[name] = value


def requests_of(
    ids: Tensor,
    mask: Tensor | None,
    keywords: Mapping[str, Any],
    generation_config: Any,
    defaults: Mapping[str, Any],
    config: GemmaConfig,
) -> list[Request]:
    """Returns a request for each row of ids :: [b, t], with left padding where mask :: [b, t] is 0.

    keywords           values of OPTIONS and "seed" that were passed to the call; None: not passed
    generation_config  None, a mapping or transformers' GenerationConfig; keywords override it
    defaults           the model's generation_config, which the other two override
    """
    options = _merge(keywords, generation_config, defaults)
    new = _new_tokens(ids.shape[1], options, config.max_position_embeddings)
    (pad,) = _token_ids("pad_token_id", options, config)
    eos = _token_ids("eos_token_id", options, config)
    stop = _stop_strings(options.get("stop_strings"))
    sampling = Sampling(**{k: v for k, v in options.items() if k in SETTINGS})
    if (seed := keywords.get("seed")) is None and sampling.do_sample:
        seed = int(torch.randint(1 << 62, (), device="cpu"))  # from torch's global generator
    sampling = replace(sampling, seed=0 if seed is None else seed)
    return [
        Request(
            ids=row, padding=padding, sampling=sampling, max_new_tokens=new,
            eos_token_ids=eos, stop_strings=stop, pad_token_id=pad,
        )
        for row, padding in zip(ids, _padding(mask, ids), strict=True)
    ]  # fmt: skip


def _merge(
    keywords: Mapping[str, Any], generation_config: Any, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the options that are not None: keywords override generation_config, which overrides
    defaults."""
    passed = _as_mapping(generation_config)
    for name, value in defaults.items():
        if name in GENERATE:
            try:
                check_keywords("the model's generation_config", {name: value}, GENERATE)
            except TypeError as problem:
                warnings.warn(f"{problem}; it is ignored", stacklevel=4)
    unknown = {k: v for k, v in passed.items() if k not in (*OPTIONS, *_METADATA) and v is not None}
    check_keywords("generation_config", unknown, GENERATE)
    levels = (keywords, passed, defaults)
    values = {k: [level[k] for level in levels if level.get(k) is not None] for k in OPTIONS}
    return {k: value[0] for k, value in values.items() if value}


def _new_tokens(prompt: int, options: Mapping[str, Any], context: int) -> int:
    """Returns the maximum number of new tokens for a prompt of `prompt` tokens. max_new_tokens,
    wherever it is set, overrides max_length, as in transformers. Warns if neither is set."""
    name = next((name for name in LENGTHS if name in options), None)
    if name is None:
        warnings.warn(f"pass max_new_tokens: the default is {DEFAULT_NEW_TOKENS}", stacklevel=4)
        given, name = max(min(DEFAULT_NEW_TOKENS, context - prompt), 1), "max_new_tokens"
    else:
        given = options[name]
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ValueError(f"{name}={given!r} must be an integer of at least 1")
    new = given if name == "max_new_tokens" else given - prompt
    if new < 1:
        raise ValueError(f"{name}={given} includes the prompt, which already has {prompt} tokens")
    if prompt + new > context:
        raise ValueError(
            f"a prompt of {prompt} tokens and max_new_tokens={new} do not fit the model's context "
            f"of {context}"
        )
    return new


def _token_ids(name: str, options: Mapping[str, Any], config: GemmaConfig) -> tuple[int, ...]:
    """Returns the token ids of the option `name`, or those of the model's config if the option is
    not set."""
    given = options.get(name, getattr(config, name))
    ids = given.tolist() if isinstance(given, Tensor) else given
    ids = tuple(ids) if isinstance(ids, list | tuple) else (ids,)
    for token in ids:
        whole = isinstance(token, int) and not isinstance(token, bool)
        if not (whole and 0 <= token < config.vocab_size):
            raise ValueError(f"{name}={given!r} must be token ids below {config.vocab_size}")
    return ids


def _stop_strings(given: str | Sequence[str] | None) -> tuple[str, ...]:
    stop = (given,) if isinstance(given, str) else tuple(given or ())
    if not all(isinstance(text, str) and text for text in stop):
        raise ValueError(f"stop_strings={given!r} must be non-empty strings")
    return stop


def _padding(mask: Any, ids: Tensor) -> list[int]:
    """Returns the number of padding ids on the left of each row."""
    if mask is None:
        return [0] * len(ids)
    real = check_shape("attention_mask", mask, ids).bool()
    if not real[:, -1].all():
        raise ValueError("pad prompts on the left: each row of attention_mask must end in 1")
    return left_padding(real).tolist()


# keys of transformers' GenerationConfig that are not options of generate()
_METADATA = ("transformers_version", "_from_model_config")


def _as_mapping(config: Any) -> Mapping[str, Any]:
    if config is None or isinstance(config, Mapping):
        return config or {}
    if not callable(getattr(config, "to_dict", None)):
        raise ValueError(
            f"generation_config must be a GenerationConfig or a dict, not {config!r:.60}"
        )
    return config.to_dict()
