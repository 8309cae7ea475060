"""Log-probabilities of new tokens, by the logits of the model: before biases, temperature and
filters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

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
    logp = sampler.kept(rows)[0].log_softmax(-1)  # [r, vocab]
    token = sampler.token[rows].clamp(min=0).unsqueeze(1)
    best = logp.topk(max(count or 0 for _, count in wanted))
    waits = copy_to_host(logp.gather(1, token).squeeze(1), best.indices, best.values)

    def wait() -> list[TokenLogprobs | None]:
        chosen, ids, values = (copied().tolist() for copied in waits)
        top = [[*zip(*pair, strict=True)] for pair in zip(ids, values, strict=True)]
        found = iter(zip(chosen, top, strict=True))
        return [None if count is None else _cut(*next(found), count) for _, count in wanted]

    return wait


def _cut(logprob: float, top: list[tuple[int, float]], count: int) -> TokenLogprobs:
    return TokenLogprobs(logprob, top[:count])
