"""Logits → the next token: the likeliest, or one drawn from what temperature and filters leave.

The order is transformers': repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_fast.kernels.choose import choose_token


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

    A filter keeps all that are as likely as the least likely one it keeps.
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

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1.0

    @property
    def needs_logits(self) -> bool:
        """Whether a token is chosen by `choose`; else kernels.lm_head.next_token does all of it."""
        return self.penalises or (self.do_sample and self._filters != (0, 1.0, 0.0))

    @property
    def graph_key(self) -> Hashable:
        """What a CUDA graph that chooses depends on; a temperature lies on the device."""
        return self.repetition_penalty, self._filters if self.do_sample else None

    @property
    def _filters(self) -> tuple[int, float, float]:
        return self.top_k, self.top_p, self.min_p

    def choose(
        self, logits: Tensor, seen: Tensor, position: Tensor, token: Tensor, arrived: Tensor,
        temperature: Tensor, seed: Tensor,
    ) -> None:  # fmt: skip
        """Writes the next tokens, of logits :: [b, vocab], to `token`; -1: they are not finite.

        seen :: [b, vocab], bool, the tokens that are penalised; temperature :: [1], fp32; the
        others are choose_token's. The host waits for nothing.
        """
        if self.penalises:
            logits = self.penalised(logits, seen)
        if self.do_sample:
            logits = self.filtered(logits, temperature)
            choose_token(logits, position, token, arrived, torch.ones_like(temperature), seed)
        else:
            choose_token(logits, position, token, arrived)

    def penalised(self, logits: Tensor, seen: Tensor) -> Tensor:
        """logits and seen, bool :: [b, vocab] → logits in fp32, those of seen tokens penalised."""
        logits, penalty = logits.float(), self.repetition_penalty
        scores = torch.where(logits > 0, logits / penalty, logits * penalty)
        return torch.where(seen, scores, logits)

    def filtered(self, logits: Tensor, temperature: Tensor | float) -> Tensor:
        """logits :: [b, vocab] over the temperature, in fp32; -inf where a filter drops the token.

        What is dropped is what lies below the least of the kept logits. Only with a top_p and no
        top_k does that need all of them in order.
        """
        logits = logits.float() / temperature
        vocab = logits.shape[-1]
        ordered = self.top_k or (vocab if self.top_p < 1 else 1)
        likeliest = logits.topk(min(ordered, vocab)).values  # the likeliest first
        first, least = likeliest[:, :1], likeliest[:, -1:]
        if self.top_p < 1:
            # A token stays while those less likely, itself included, hold more than 1 - top_p.
            ascending = likeliest.flip(-1)
            kept = ascending.softmax(-1).cumsum(-1) > 1 - self.top_p
            least = torch.where(kept, ascending, first).amin(-1, keepdim=True)
        elif not self.top_k:
            least = torch.full_like(first, float("-inf"))
        if self.min_p > 0:
            least = torch.maximum(least, first + math.log(self.min_p))
        return logits.masked_fill(logits < least, float("-inf"))


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda x: 1e-3 <= x <= 1e3, "from 0.001 to 1000 (greedy is do_sample=False)"),
    "top_k": (lambda x: isinstance(x, int) and x >= 0, "a whole number from 0 (all tokens)"),
    "top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "min_p": (lambda x: 0 <= x <= 1, "from 0 to 1"),
    "repetition_penalty": (lambda x: 0 < x < float("inf"), "above 0 (1 is none)"),
}
