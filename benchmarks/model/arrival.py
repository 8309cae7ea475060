"""The case `Arrival`: more prompts than texts that are decoded at the same time.

    32 x pp512+tg64  32 prompts of 16, 32, …, 512 tokens in mixed order, and 64 new tokens for each

All prompts are given at once, and up to `batch` texts are decoded at the same time. The time counts
from the first prompt to the last token, prompts included. Each provider reads its tokens back. The
texts are checked once, and this run also warms the provider up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from gemma_fast.benchmarks.measure.machine import Work
from gemma_fast.benchmarks.measure.outcome import Wrong, full_precision
from gemma_fast.benchmarks.measure.timing import clock
from gemma_fast.benchmarks.model.attempt import Attempt, forget_judge
from gemma_fast.benchmarks.model.cases import ARRIVAL, NO_SIZES, Case, Sizes
from gemma_fast.benchmarks.model.judge import ROWS, TOLERANCE, Judge, under_the_best
from gemma_fast.config import GemmaConfig


@dataclass(frozen=True, kw_only=True)
class Arrival(Case):
    """`prompts` prompts of up to `longest` tokens, each continued by `tokens` tokens; `batch` texts
    at the same time."""

    kind: str = ARRIVAL
    prompts: int
    longest: int

    @property
    def name(self) -> str:
        return f"{self.prompts} x pp{self.longest}+tg{self.tokens}"

    @property
    def room(self) -> int:
        return self.longest + self.tokens

    @property
    def total(self) -> int:
        return self.prompts * self.tokens

    def work(self, config: GemmaConfig, itemsize: int, sizes: Sizes = NO_SIZES) -> Work:
        """Returns no work: a share of the roof is not defined for prompts and steps together."""
        return Work(0, 0)

    def ids(self, vocab_size: int) -> list[list[int]]:
        """Returns random prompts, whose lengths are multiples of longest / prompts."""
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(self.prompts, generator=generator).tolist()
        sizes = [-(-self.longest * (i + 1) // self.prompts) for i in order]
        return [torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in sizes]


def arrivals(
    numbers: Sequence[int], prompts: Sequence[int], new: Sequence[int], batches: Sequence[int]
) -> list[Arrival]:
    """Returns a case for every combination of the values, but no case with a value of 0.

    numbers: of prompts; prompts: length of the longest one; new: new tokens of each
    """
    return [
        Arrival(tokens=n, batch=batch, prompts=number, longest=longest)
        for batch, number, longest, n in product(batches, numbers, prompts, new)
        if number and longest and n
    ]


class ArrivalAttempt(Attempt):
    """A loaded provider in an `Arrival`, with its result so far."""

    case: Arrival

    def check(self, judge: Judge) -> None:
        """Raises Wrong if the provider's texts are wrong."""
        case = self.case
        self.ids = case.ids(judge.vocab_size)
        self.provider.start(case.batch, case.room, case.kind)
        texts = self.provider.texts(self.ids, case.tokens)
        found = check_texts(judge, self.ids, texts, case.tokens, self.loaded.dtype)
        self.result = replace(self.result, error=found)

    def warm_up(self, vocab_size: int) -> None:
        """On a GPU, runs the case again, because its memory was freed. On a CPU, the check was the
        warm-up."""
        if self.cuda:
            forget_judge()
            self.once()

    def once(self) -> float:
        """Runs the case once, and returns its seconds."""
        start = clock()
        self.provider.texts(self.ids, self.case.tokens)
        return clock() - start


def check_texts(
    judge: Judge, prompts: Sequence[list[int]], texts: Sequence[list[int]], new: int,
    dtype: torch.dtype,
) -> float:  # fmt: skip
    """Returns the regret of texts (see Judge), which a provider computed in `dtype`. The reference
    reads ROWS of them, from the first to the last.

    Raises Wrong if a text has not `new` tokens, or if its tokens are not greedy. In float32, each
    token's logit in the reference must be within TOLERANCE of the largest one: a tie. In 16 bits,
    the mean distance must be.
    """
    if dtype == torch.float32 and not judge.exact:
        raise NotImplementedError("not enough memory for the reference in float32")
    if {*map(len, texts)} != {new} or len(texts) != len(prompts):
        raise Wrong(f"there are not {len(prompts)} texts of {new} new tokens")
    last = len(prompts) - 1
    rows = sorted({last * i // (ROWS - 1) for i in range(ROWS)})
    try:
        gaps = torch.stack([_gaps(judge, prompts[row], texts[row]) for row in rows])
    except torch.OutOfMemoryError as problem:
        raise NotImplementedError("not enough memory for the reference") from problem
    regret, limit = float(gaps.max() if dtype == torch.float32 else gaps.mean()), TOLERANCE[dtype]
    if not regret <= limit:
        raise Wrong(f"greedy tokens are {regret:.2g} sd below the best logit, limit {limit:g}")
    return regret


def _gaps(judge: Judge, prompt: list[int], text: list[int]) -> Tensor:
    """Returns for each token of a text how far its logit in the reference is below the largest one,
    in standard deviations of the logits."""
    ids = torch.tensor([prompt + text[:-1]], device=judge.device)
    with full_precision():
        logits = judge.reference(ids, logits_to_keep=len(text)).logits[0].float()  # [new, vocab]
    return under_the_best(logits, torch.tensor(text, device=judge.device)) / logits.std(-1)
