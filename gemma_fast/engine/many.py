"""`generate_many` yields the results of many requests, which a scheduler decodes together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemma_fast.compat import ONE_TEXT
from gemma_fast.config import GemmaConfig
from gemma_fast.engine.bias import as_int
from gemma_fast.engine.logprobs import TokenLogprobs
from gemma_fast.engine.options import merge_options
from gemma_fast.engine.request import Request, requests_of
from gemma_fast.engine.scheduler import Scheduler
from gemma_fast.engine.text import Text

MAX_LOGPROBS = 20


class Generated(NamedTuple):
    """The result of one request of generate_many().

    number    of the request, from 0
    ids       its new tokens, an end token or stop string included
    reason    "stop": an end token or a stop string; "length": max_new_tokens; "time": max_time;
              "error"
    logprobs  log-probabilities of each new token, if the request has logprobs=…
    error     the exception of an "error"
    """

    number: int
    ids: list[int]
    reason: str
    logprobs: list[TokenLogprobs]
    error: Exception | None = None


def generate_many(
    scheduler: Scheduler, requests: Iterable[Request | Exception]
) -> Iterator[Generated]:
    """Yields the result of each request when its text ends. An exception in place of a request is
    its error. A request is taken when a row of the scheduler is free, so there may be no end to
    them."""
    numbers: dict[Text, int] = {}
    items = enumerate(requests)
    more = True
    while more or scheduler:
        while more and scheduler.waiting + scheduler.running < scheduler.rows:
            number, request = next(items, (-1, None))
            if request is None:
                more = False
                break
            try:
                if isinstance(request, Exception):
                    raise request
                numbers[scheduler.add(request)] = number
            except (ValueError, TypeError) as error:
                yield Generated(number, [], "error", [], error)
        for text in scheduler.step():
            if text.reason is not None:
                number = numbers.pop(text)
                yield Generated(number, text.ids, text.reason, text.logprobs, text.error)


def one_request(
    ids: Tensor, options: Mapping[str, Any], defaults: Any, seed: int | None,
    logprobs: int | None, config: GemmaConfig,
) -> Request:  # fmt: skip
    """Returns the request for one prompt ids :: [1, t]. options override defaults, the model's
    generation_config."""
    if len(ids) != 1:
        raise ValueError(f"input_ids has {len(ids)} prompts: a request has one")
    if as_int(options.get("num_return_sequences", 1) or 1) != 1:
        raise ValueError(
            f"num_return_sequences={options['num_return_sequences']!r:.60}: a request has one text;"
            " send several requests with different seeds"
        )
    for name in ("return_dict_in_generate", "output_scores", "output_logits"):
        if options.get(name):
            raise ValueError(f"{name}: a request returns no logits, only logprobs=…")
    if logprobs is not None and as_int(logprobs) not in range(MAX_LOGPROBS + 1):
        raise ValueError(f"{logprobs=!r:.60} must be an integer from 0 to {MAX_LOGPROBS}")
    merged = {**merge_options(options, None, defaults), **ONE_TEXT}
    (request,) = requests_of(ids, torch.ones_like(ids), merged, seed, config)
    return replace(request, stops_in_prompt=False, logprobs=logprobs)
