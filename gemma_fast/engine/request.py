"""`Request` is one prompt to continue, with its settings. `requests_of` creates the requests of a
call of generate(). An option out of range raises ValueError, which names the value and the allowed
values.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gemma_fast.config import GemmaConfig
from gemma_fast.engine.bias import as_int, biases_of
from gemma_fast.engine.sampling import Sampling
from gemma_fast.model.padding import check_shape, left_padding

SETTINGS = (
    "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
    "no_repeat_ngram_size",
)  # fmt: skip
LENGTHS = ("max_new_tokens", "max_length")
# transformers' defaults
DEFAULT_NEW_TOKENS = 20
DEFAULT_TOP_K = 50
MAX_TEXTS = 4096  # texts of a call with num_return_sequences


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A prompt to continue, and the settings for its text.

    ids             [t], int64: left padding, then the prompt; t is equal in all requests of a call
    padding         number of padding ids on the left
    sampling        sampling settings
    max_new_tokens  maximum number of new tokens
    max_time        seconds after which the text ends
    eos_token_ids   tokens that end the text
    stop_strings    strings that end the text when their last character is generated
    stops_in_prompt  True: a stop string may begin in the prompt, as in transformers' generate()
    pad_token_id    fills the row after the text has ended; None: the row gets further tokens
    logprobs        number of likeliest tokens whose log-probabilities are returned with that of
                    each new token; None: no log-probabilities
    """

    ids: Tensor
    padding: int
    sampling: Sampling
    max_new_tokens: int
    max_time: float
    eos_token_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    pad_token_id: int | None
    stops_in_prompt: bool = True
    logprobs: int | None = None


def requests_of(
    ids: Tensor,
    mask: Tensor | None,
    options: Mapping[str, Any],
    seed: int | None,
    config: GemmaConfig,
) -> list[Request]:
    """Returns a request for each row of ids :: [b, t], with left padding where mask :: [b, t] is 0;
    with num_return_sequences=n, n successive requests for each row. The noise of each request has a
    seed of its own, see `seed_of`.

    options  values of compat.APPLIED, see `merge_options`
    seed     seed of the sampling noise; None: torch's global generator sets it
    """
    new = _new_tokens(ids.shape[1], options, config.max_position_embeddings)
    given, pads = (_token_ids(f"{name}_token_id", options) for name in ("eos", "pad"))
    if pads and len(pads) > 1:
        raise ValueError(f"pad_token_id={options['pad_token_id']!r:.60} must be one token id")
    first = (pads or given or (None,))[0]
    eos = end_token_ids(options, config.vocab_size)
    stop = _stop_strings(options.get("stop_strings"))
    sampling = _sampling(options, seed, eos, ids.shape[1], config.vocab_size)
    _warn_of_minimum(ids.shape[1], new, options)
    copies = _copies(options.get("num_return_sequences", 1), len(ids), sampling)
    rows = zip(ids, _padding(mask, ids, first, given or ()), strict=True)
    return [
        Request(
            ids=row, padding=padding, max_new_tokens=new,
            sampling=replace(sampling, seed=seed_of(sampling.seed, number)),
            max_time=_seconds(options), eos_token_ids=eos, stop_strings=stop,
            pad_token_id=None if given is None else first,
        )
        for number, (row, padding) in enumerate(row for row in rows for _ in range(copies))
    ]  # fmt: skip


def seed_of(seed: int, number: int) -> int:
    """Returns the seed of text `number` of a call with this seed. Text 0 has the seed itself."""
    return (seed + number * 0x1E3779B97F4A7C15) % (1 << 63)


def end_token_ids(options: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """Returns the tokens that end a text: those of eos_token_id, without ids outside the
    vocabulary, which the model cannot generate."""
    given = _token_ids("eos_token_id", options) or ()
    return tuple(token for token in given if 0 <= token < vocab_size)


def _sampling(
    options: Mapping[str, Any], seed: int | None, eos: Sequence[int], prompt: int, vocab_size: int
) -> Sampling:
    settings = {"top_k": DEFAULT_TOP_K} | {k: v for k, v in options.items() if k in SETTINGS}
    sampling = Sampling(**settings, biases=biases_of(options, eos, prompt, vocab_size))
    if seed is None and sampling.do_sample:
        seed = int(torch.randint(1 << 62, (), device="cpu"))  # from torch's global generator
    return replace(sampling, seed=0 if seed is None else seed)


def _copies(given: Any, rows: int, sampling: Sampling) -> int:
    copies = as_int(given)
    if copies is None or copies < 1:
        raise ValueError(f"num_return_sequences={given!r:.60} must be an integer of at least 1")
    if copies > 1 and rows * copies > MAX_TEXTS:
        raise ValueError(
            f"num_return_sequences={given!r:.60} makes {rows * copies} texts from {rows} prompts:"
            f" one call makes at most {MAX_TEXTS}, so call generate() several times"
        )
    if copies > 1 and not sampling.do_sample:
        raise ValueError(
            f"num_return_sequences={given} would give equal texts: pass do_sample=True, because "
            "decoding is greedy"
        )
    return copies


def _warn_of_minimum(prompt: int, new: int, options: Mapping[str, Any]) -> None:
    for name, most in (("min_new_tokens", new), ("min_length", prompt + new)):
        if (least := as_int(options.get(name))) is not None and least > most:
            warnings.warn(
                f"{name}={least} is more than the {most} tokens to which the maximum limits the"
                " text: raise max_new_tokens",
                stacklevel=4,
            )
        if least is not None:
            return  # min_new_tokens overrides min_length


def _seconds(options: Mapping[str, Any]) -> float:
    seconds = options.get("max_time", math.inf)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise ValueError(f"max_time={seconds!r:.60} must be a number of seconds")
    return seconds


def _new_tokens(prompt: int, options: Mapping[str, Any], context: int) -> int:
    """Returns the maximum number of new tokens for a prompt of `prompt` tokens. max_new_tokens,
    wherever it is set, overrides max_length, as in transformers. Warns if neither is set."""
    name = next((name for name in LENGTHS if name in options), None)
    if name is None:
        warnings.warn(f"pass max_new_tokens: the default is {DEFAULT_NEW_TOKENS}", stacklevel=4)
        options = {"max_new_tokens": max(min(DEFAULT_NEW_TOKENS, context - prompt), 1)}
        name = "max_new_tokens"
    given = as_int(options[name])
    if given is None or given < 1:
        raise ValueError(f"{name}={options[name]!r:.60} must be an integer of at least 1")
    new = given if name == "max_new_tokens" else given - prompt
    if new < 1:
        raise ValueError(f"{name}={given} includes the prompt, which already has {prompt} tokens")
    if prompt + new > context:
        raise ValueError(
            f"a prompt of {prompt} tokens and max_new_tokens={new} do not fit the model's context "
            f"of {context}"
        )
    return new


def _token_ids(name: str, options: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Returns the token ids of the option `name`, or None if it is not set."""
    given = options.get(name)
    if given is None:
        return None
    listed = given.tolist() if hasattr(given, "tolist") else given
    ids = [as_int(token) for token in (listed if isinstance(listed, list | tuple) else [listed])]
    if None in ids:
        raise ValueError(
            f"{name}={given!r:.60} must be integers, for example tokenizer.{name}; {name}=None: no"
            " such token"
        )
    return tuple(token for token in ids if token is not None)


def _stop_strings(given: Any) -> tuple[str, ...]:
    stop = (given,) if isinstance(given, str) else given or ()
    if not isinstance(stop, list | tuple | set) or not all(isinstance(x, str) and x for x in stop):
        raise ValueError(f"stop_strings={given!r:.60} must be non-empty strings")
    return tuple(stop)


def _padding(mask: Any, ids: Tensor, pad: int | None, eos: Sequence[int]) -> list[int]:
    """Returns the number of padding ids on the left of each row. Without a mask, pad_token_id is
    padding unless it is an end token, as in transformers."""
    if mask is not None:
        real = check_shape("attention_mask", mask, ids).bool()
    else:
        real = torch.ones_like(ids).bool() if pad is None or pad in eos else ids != pad
        if (real[:, :-1] & ~real[:, 1:]).any():
            raise ValueError(
                f"input_ids has pad_token_id={pad} after other tokens: pad prompts on the left, or"
                " pass attention_mask with 1 for each token that is not padding"
            )
    if not real[:, -1].all():
        raise ValueError("pad prompts on the left: each row of attention_mask must end in 1")
    return left_padding(real).tolist()
