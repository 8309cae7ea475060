"""Scores texts: the sum of the log-probabilities of their tokens, each after the tokens before it.

`token_logprobs` is also the scoring of lm_scoring.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from gemma_fast.batch.answers import Answer
from gemma_fast.batch.job import Job, Task
from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.engine.generate import not_finite
from gemma_fast.text.batch import pack

SORTED = 16  # batches of rows that are sorted by length together
MAX_TOKENS = 16384  # of a batch, padding included, unless it has one text
MAX_LOGITS = 512  # tokens whose logits are in memory at the same time; 0.5 GB in float32


def token_logprobs(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the log-probability of each target token, float32, and whether it is the likeliest
    token.

    logits  [..., vocab]
    target  [...], int64
    """
    logp = torch.log_softmax(logits.float(), dim=-1)
    return logp.gather(-1, target.unsqueeze(-1)).squeeze(-1), logp.argmax(-1) == target


def score_texts(
    model: GemmaForCausalLM, job: Job, tasks: Iterable[Task], pad_token_id: int
) -> Iterator[Answer]:
    """Yields the answer of each task: logprob, the sum over its last `scored` tokens, and tokens,
    their number. Texts of similar length are computed together."""
    tasks = iter(tasks)
    while window := [*islice(tasks, SORTED * job.batch_size)]:
        good = []
        for task in window:
            if task.error is None:
                good.append(task)
            else:
                yield task.failure(task.error)
        good.sort(key=lambda task: len(task.ids))
        while good:
            rows = max(min(job.batch_size, MAX_TOKENS // len(good[-1].ids)), 1)
            batch, good = good[-rows:], good[:-rows]
            yield from _scored(model, batch, pad_token_id)


def _scored(model: GemmaForCausalLM, batch: Sequence[Task], pad_token_id: int) -> Iterator[Answer]:
    """Yields the answers of a batch. If memory runs out, its halves are computed one by one; a
    single text gets an error."""
    try:
        sums = _sums(model, batch, pad_token_id)
    except (torch.OutOfMemoryError, MemoryError) as error:
        if len(batch) == 1:
            yield batch[0].failure(error)
            return
        sums = None
    if sums is None:  # outside of `except`, because the exception keeps tensors alive
        half = len(batch) // 2
        yield from _scored(model, batch[:half], pad_token_id)
        yield from _scored(model, batch[half:], pad_token_id)
        return
    for task, logprob in zip(batch, sums, strict=True):
        if math.isfinite(logprob):
            yield task.answer(logprob=logprob, tokens=task.scored)
        else:
            yield task.failure(not_finite(len(task.ids), changed=False))


@torch.no_grad()
def _sums(model: GemmaForCausalLM, tasks: Sequence[Task], pad_token_id: int) -> list[float]:
    """Returns for each task the sum of the log-probabilities of its scored tokens. The texts are
    computed in parts of at most MAX_LOGITS tokens."""
    padded = pack([task.ids for task in tasks], pad_token_id, "pt", True, flat=False)
    ids, mask = padded.input_ids.to(model.device), padded.attention_mask.to(model.device)
    rows, length = ids.shape
    starts = torch.tensor([length - task.scored for task in tasks], device=ids.device)
    sums = torch.zeros(rows, dtype=torch.float64, device=ids.device)
    size = max(MAX_LOGITS // rows, 1)
    cache = None
    for start in range(0, length - 1, size):
        stop = min(start + size, length - 1)
        output = model(ids[:, start:stop], mask[:, :stop], past_key_values=cache)
        cache = output.past_key_values
        target = ids[:, start + 1 : stop + 1]
        logprobs, _ = token_logprobs(output.logits, target)
        places = torch.arange(start + 1, stop + 1, device=ids.device)
        sums += logprobs.double().where(places >= starts[:, None], 0).sum(1)
    return sums.tolist()
