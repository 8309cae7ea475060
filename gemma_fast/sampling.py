"""Logits → the next token: the likeliest, or one drawn from what temperature and filters leave.

The order is transformers': repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose tokens. ValueError: a value out of its range.

    do_sample           False: the likeliest token, whatever temperature and filters say
    temperature         logits are divided by it
    top_k               ≥ 1: only the k likeliest; 0: all
    top_p               in (0, 1]: only the fewest likeliest whose probabilities reach p together
    min_p               in [0, 1]: only those at least min_p times as likely as the likeliest
    repetition_penalty  > 0: logits of tokens seen before are divided by it where positive, else
                        multiplied (Keskar et al. 2019, CTRL)
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, (in_range, words) in _RANGES.items():
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and in_range(value)):
                raise ValueError(f"{name}={value!r} is out of range: it must be {words}")
        if not isinstance(self.do_sample, bool):
            raise ValueError(f"do_sample={self.do_sample!r} must be true or false")

    def __call__(
        self, logits: Tensor, seen: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """logits :: [b, vocab], seen :: [b, s] the ids so far → [b] the next ids."""
        logits = logits.float()
        if self.repetition_penalty != 1.0:
            penalty = self.repetition_penalty
            scores = logits.gather(1, seen)
            scores = torch.where(scores > 0, scores / penalty, scores * penalty)
            logits = logits.scatter(1, seen, scores)
        if not self.do_sample:
            return logits.argmax(-1)
        probabilities = self.filtered(logits).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)

    def filtered(self, logits: Tensor) -> Tensor:
        """logits :: [b, vocab] over the temperature, -inf where a filter drops the token."""
        logits = logits / self.temperature
        if self.top_k:
            k = min(self.top_k, logits.shape[-1])
            logits = logits.masked_fill(logits < logits.topk(k).values[:, -1:], float("-inf"))
        if self.top_p < 1:
            ascending, order = logits.sort()
            # A token stays while those less likely, itself included, hold more than 1 - top_p.
            dropped = ascending.softmax(-1).cumsum(-1) <= 1 - self.top_p
            dropped[:, -1] = False
            logits = logits.masked_fill(dropped.scatter(1, order, dropped), float("-inf"))
        if self.min_p > 0:
            probabilities = logits.softmax(-1)
            floor = self.min_p * probabilities.max(-1, keepdim=True).values
            logits = logits.masked_fill(probabilities < floor, float("-inf"))
        return logits


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda x: 1e-3 <= x <= 1e3, "from 0.001 to 1000 (greedy is do_sample=False)"),
    "top_k": (lambda x: isinstance(x, int) and x >= 0, "a whole number from 0 (all tokens)"),
    "top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "min_p": (lambda x: 0 <= x <= 1, "from 0 to 1"),
    "repetition_penalty": (lambda x: 0 < x < float("inf"), "above 0 (1 is none)"),
}
