"""Log-probabilities of new tokens, by the logits of the model: before biases, temperature and
filters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from gemma_fast.engine.host_copy import copy_to_host
from gemma_fast.engine.sampler import Sampler


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one new token."""

    logprob: float  # of the token
    top: list[tuple[int, float]]  # ids and log-probabilities of the likeliest tokens, in order


def start_logprobs(
    sampler: Sampler, wanted: Sequence[tuple[int, int | None]]
) -> Callable[[], list[TokenLogprobs | None]]:
    """Starts to compute the log-probabilities of the newest tokens. Returns a function that waits
    for them, and returns one result for each item of `wanted`.

    wanted  row, and number of likeliest tokens; None: the result is None. The sampler must keep the
            logits of the other rows
    """
    rows = [row for row, count in wanted if count is not None]
    if not rows:
        return lambda: [None] * len(wanted)
    logits, tokens = sampler.logits, sampler.token
    logp = torch.stack([logits[row] for row in rows]).log_softmax(-1)  # [r, vocab]
    token = torch.stack([tokens[row] for row in rows]).clamp(min=0).unsqueeze(1)  # [r, 1]
    best = logp.topk(max(count or 0 for _, count in wanted))
    waits = copy_to_host(logp.gather(1, token).squeeze(1), best.indices, best.values)

    def wait() -> list[TokenLogprobs | None]:
        chosen, ids, values = (copied().tolist() for copied in waits)
        top = [[*zip(*pair, strict=True)] for pair in zip(ids, values, strict=True)]
        found = iter(zip(chosen, top, strict=True))
        return [None if n is None else _first(n, *next(found)) for _, n in wanted]

    return wait


def _first(count: int, logprob: float, top: list[tuple[int, float]]) -> TokenLogprobs:
    return TokenLogprobs(logprob, top[:count])
