"""How tokens are chosen: the settings of a text, and the sampler of a batch, a row's settings each.

The order is transformers': repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose the tokens of a text. ValueError: a value out of its range.

    do_sample           False: the likeliest token, whatever temperature and filters say
    temperature         logits are divided by it
    top_k               ≥ 1: only the k likeliest; 0: all
    top_p               in (0, 1]: only the fewest likeliest whose probabilities reach p together
    min_p               in [0, 1]: only those at least min_p times as likely as the likeliest
    repetition_penalty  > 0: logits of tokens seen before are divided by it where positive, else
                        multiplied (Keskar et al. 2019, CTRL)
    seed                of the noise that draws: from 0, below 2**63

    A filter keeps all that are as likely as the least likely one it keeps.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (in_range, words) in _RANGES.items():
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and in_range(value)):
                raise ValueError(f"{name}={value!r} is out of range: it must be {words}")
        if not isinstance(self.do_sample, bool):
            raise ValueError(f"do_sample={self.do_sample!r} must be true or false")
        whole = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        if not (whole and 0 <= self.seed < 1 << 63):
            raise ValueError(f"seed={self.seed!r} must be a whole number from 0, below 2**63")


class Sampler:
    """Chooses the next token of each row by the settings of its text, see model.gemma.Sampler.

    token  [b], int64: the newest token of each row; -1: its logits were not finite

    Everything that may differ between replays of a CUDA graph is in tensors whose memory stays the
    same; a graph depends on `graph_key` besides.
    """

    def __init__(self, batch: int, vocab_size: int, device: torch.device | str) -> None:
        def setting(dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(batch, dtype=dtype, device=device)

        self.token, self._seed, self._top_k = (setting(torch.int64) for _ in range(3))
        self._temperature, self._divisor, self._samples = (setting() for _ in range(3))
        self._penalty, self._tail, self._log_min_p = (setting() for _ in range(3))
        self._seen = torch.zeros(0, dtype=torch.bool, device=device)  # [b, vocab] once it is needed
        self._vocab_size = vocab_size
        self.set([])

    def set(self, texts: Sequence[Sampling]) -> None:
        """Takes the settings of the first rows; the others are greedy. No token is seen yet."""
        rows = [*texts, *[Sampling()] * (len(self.token) - len(texts))]
        vocab_size = self._vocab_size
        self._any_samples = any(row.do_sample for row in rows)
        self._penalises = any(row.repetition_penalty != 1 for row in rows)
        # How many of the likeliest logits the filters need in order; 0: there are no filters.
        self._ordered = max(_ordered(row, vocab_size) for row in rows)
        _fill(self._seed, (row.seed for row in rows))
        _fill(self._samples, (float(row.do_sample) for row in rows))
        _fill(self._temperature, (row.temperature * row.do_sample for row in rows))
        _fill(self._divisor, (row.temperature if row.do_sample else 1.0 for row in rows))
        _fill(self._penalty, (row.repetition_penalty for row in rows))
        _fill(self._top_k, (min(row.top_k or vocab_size, vocab_size) for row in rows))
        _fill(self._tail, (1 - row.top_p for row in rows))  # what top-p drops
        _fill(self._log_min_p, (math.log(row.min_p) if row.min_p else -math.inf for row in rows))
        self.token.zero_()
        if self._penalises:
            if not self._seen.numel():
                with torch.inference_mode(False):
                    self._seen = self._seen.new_zeros(len(rows), self._vocab_size)
            self._seen.zero_()

    def rows(self, rows: slice) -> Sampler:
        """The sampler of these rows, in the same memory."""
        part = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(part, name, value[rows])
        return part

    def read(self, ids: Tensor) -> None:
        """Notes ids :: [b, t] for the repetition penalty."""
        if self._penalises:
            self._seen.scatter_(1, ids.clamp(min=0), True)

    @property
    def graph_key(self) -> Hashable:
        return self._any_samples, self._penalises, self._ordered

    @property
    def temperature(self) -> Tensor | None:
        """For the logits that `process` returns, which are divided already: 1, or 0 for greedy."""
        if not self._any_samples:
            return None
        return self._samples if self.process else self._temperature

    @property
    def seed(self) -> Tensor | None:
        return self._seed if self._any_samples else None

    @property
    def process(self) -> Callable[[Tensor], Tensor] | None:
        return self._process if self._penalises or self._ordered else None

    @property
    def nbytes(self) -> int:
        """Bytes of what the penalty has seen; the rest is small."""
        return self._seen.nbytes

    def _process(self, logits: Tensor) -> Tensor:
        """logits :: [b, vocab] → fp32, penalised, over the temperature, and -inf where a filter
        drops the token."""
        logits = logits.float()
        if self._penalises:
            penalty = self._penalty.unsqueeze(1)
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self._seen, penalised, logits)
        logits = logits / self._divisor.unsqueeze(1)
        if self._ordered:
            logits = logits.masked_fill(logits < self._least_kept(logits), float("-inf"))
        return logits

    def _least_kept(self, logits: Tensor) -> Tensor:
        """The least logit that a row's filters keep, [b, 1]; -inf: all of them."""
        likeliest = logits.topk(self._ordered).values  # [b, ordered], the likeliest first
        top_k, tail, best = self._top_k.unsqueeze(1), self._tail.unsqueeze(1), likeliest[:, :1]
        rank = torch.arange(self._ordered, device=logits.device)
        # A token stays while those less likely, itself included, hold more than 1 - top_p.
        ascending = likeliest.masked_fill(rank >= top_k, float("-inf")).flip(-1)
        kept = (ascending.softmax(-1).cumsum(-1) > tail) | ((tail == 0) & ascending.isfinite())
        least = torch.where(kept, ascending, best).amin(-1, keepdim=True)
        unfiltered = (top_k >= self._vocab_size) & (tail == 0)
        least = least.masked_fill(unfiltered, float("-inf"))
        return torch.maximum(least, best + self._log_min_p.unsqueeze(1))


def _ordered(row: Sampling, vocab_size: int) -> int:
    if not row.do_sample or (row.top_k, row.top_p, row.min_p) == (0, 1, 0):
        return 0
    return min(row.top_k or (vocab_size if row.top_p < 1 else 1), vocab_size)


def _fill(setting: Tensor, values: Iterable[float]) -> None:
    setting.copy_(torch.tensor([*values], dtype=setting.dtype, device="cpu"))


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda x: 1e-3 <= x <= 1e3, "from 0.001 to 1000 (greedy is do_sample=False)"),
    "top_k": (lambda x: isinstance(x, int) and x >= 0, "a whole number from 0 (all tokens)"),
    "top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "min_p": (lambda x: 0 <= x <= 1, "from 0 to 1"),
    "repetition_penalty": (lambda x: 0 < x < float("inf"), "above 0 (1 is none)"),
}
