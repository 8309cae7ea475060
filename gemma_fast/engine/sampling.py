"""`Sampling` stores the sampling settings of one text; `Sampler` stores them for a whole batch.

The settings apply in the same order as in transformers: biases, repetition penalty, the caller's
functions (`Processor`), temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_fast.engine.bias import Bias, Biases

# Function from ids :: [b, t], left padding included, and logits :: [b, vocab], fp32, to new logits.
Processor = Callable[[Tensor, Tensor], Tensor]
# Logits of the model and processed logits :: [b, vocab], fp32, of each new token.
Record = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings of one text. Raises ValueError for a value out of range.

    do_sample           False: greedy, the most likely token; temperature and filters are ignored
    temperature         divides the logits; 0: greedy
    top_k               ≥ 1: keep only the k most likely tokens; 0: keep all
    top_p               in [0, 1]: keep only the smallest set of most likely tokens that has a total
                        probability of at least top_p
    min_p               in [0, 1]: keep only tokens that have at least min_p times the probability
                        of the most likely one
    repetition_penalty  > 0: divides the positive logits of tokens seen before, and multiplies their
                        negative logits (Keskar et al. 2019, CTRL)
    no_repeat_ngram_size  n ≥ 1: exclude each token with which the last n tokens would repeat n
                        tokens of the text; 0: no limit
    biases              numbers to add to logits, see `engine.bias`
    seed                seed of the sampling noise, from 0 to 2**63 - 1

    top_k, top_p and min_p are filters. If several tokens are exactly as likely as the least likely
    token that a filter keeps, it keeps all of them.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    biases: tuple[Bias, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.do_sample, bool):
            raise ValueError(f"do_sample={self.do_sample!r} must be True or False")
        if not self.do_sample or self.temperature == 0:
            for name in ("do_sample", "temperature", "top_k", "top_p", "min_p"):
                object.__setattr__(self, name, getattr(Sampling, name))  # ignored
        for name, (in_range, words) in _RANGES.items():
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and in_range(value)):
                raise ValueError(f"{name}={value!r} is out of range: it must be {words}")
        whole = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        if not (whole and 0 <= self.seed < 1 << 63):
            raise ValueError(f"seed={self.seed!r} must be an integer from 0 to 2**63 - 1")

    @property
    def changes_logits(self) -> bool:
        """True if biases, a limit on n-grams or a repetition penalty change the logits."""
        return bool(self.biases or self.no_repeat_ngram_size or self.repetition_penalty != 1)


class Sampler:
    """Stores each row's sampling settings and newest token, for `Gemma.step`.

    token  [b], int64: the newest token of each row; -1: the token's logits were not finite

    Everything that changes between replays of a CUDA graph is stored in tensors with fixed
    addresses. A graph is valid for one value of `graph_key` only. `follow` runs outside the graph.
    """

    def __init__(self, batch: int, vocab_size: int, device: torch.device | str) -> None:
        def setting(dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(batch, dtype=dtype, device=device)

        self.token, self._seed, self._top_k = (setting(torch.int64) for _ in range(3))
        self._temperature, self._divisor, self._samples = (setting() for _ in range(3))
        self._penalty, self._tail, self._log_min_p = (setting() for _ in range(3))
        # `set` makes these two [b, vocab] when they are needed.
        self._seen = torch.zeros(0, dtype=torch.bool, device=device)
        self._bias = torch.zeros(0, dtype=torch.float32, device=device)
        self._vocab_size = vocab_size
        self.set([])

    def set(
        self, texts: Sequence[Sampling], processors: Sequence[Processor] = (),
        record: Record | None = None,
    ) -> None:  # fmt: skip
        """Sets the settings of the first len(texts) rows, for new texts; all other rows are greedy.
        `processors` and `record` get the logits of the first len(texts) rows only."""
        rows = [*texts, *[Sampling()] * (len(self.token) - len(texts))]
        vocab_size = self._vocab_size
        self._any_samples = any(row.do_sample for row in rows)
        self._penalizes = any(row.repetition_penalty != 1 for row in rows)
        # Number of top logits that the filters need in sorted order; 0: there are no filters.
        self._ordered = max(_ordered(row, vocab_size) for row in rows)
        _fill(self._seed, (row.seed for row in rows))
        _fill(self._samples, (float(row.do_sample) for row in rows))
        _fill(self._temperature, (row.temperature * row.do_sample for row in rows))
        _fill(self._divisor, (row.temperature if row.do_sample else 1.0 for row in rows))
        _fill(self._penalty, (row.repetition_penalty for row in rows))
        _fill(self._top_k, (min(row.top_k or vocab_size, vocab_size) for row in rows))
        _fill(self._tail, (1 - row.top_p for row in rows))  # total probability that top_p may drop
        _fill(self._log_min_p, (math.log(row.min_p) if row.min_p else -math.inf for row in rows))
        self.token.zero_()
        if self._penalizes:
            self._seen = self._of_all_tokens(self._seen).zero_()
        sizes, device = [row.no_repeat_ngram_size for row in texts], self.token.device
        self._biases = Biases([row.biases for row in texts], sizes, device)
        if self._biases:
            self._bias = self._of_all_tokens(self._bias)
        self._processors, self._record = processors, record
        self._ids = torch.zeros(len(texts), 0, dtype=torch.int64, device=device)
        self._prompt = 0  # tokens of the prompt

    def clear(self) -> None:
        """Frees what belongs to the last texts: functions, records of logits, ids and biases."""
        self._processors, self._record = (), None
        self._ids = self._ids.new_zeros(0, 0)
        self._biases = Biases([], [], self.token.device)

    def _of_all_tokens(self, setting: Tensor) -> Tensor:
        if setting.numel():
            return setting
        with torch.inference_mode(False):
            return setting.new_zeros(len(self.token), self._vocab_size)

    def rows(self, rows: slice) -> Sampler:
        """Returns a sampler of these rows in the same memory."""
        part = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(part, name, value[rows])
        return part

    def read(self, ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Marks the tokens ids :: [b, t] as seen in their rows, for the repetition penalty. Skips
        left padding, where attention_mask :: [b, t] is 0."""
        if self._penalizes:
            if attention_mask is not None:
                ids = ids.where(attention_mask.bool(), ids[:, -1:])
            self._seen.scatter_(1, ids.clamp(min=0), True)

    def follow(self, ids: Tensor) -> None:
        """Appends ids :: [b, t], left padding included, to the texts, and computes the biases of
        the next tokens. The first call after `set` gets the prompts."""
        if not (self._biases or self._processors):
            return
        known = self._ids.shape[1]
        self._ids = torch.cat((self._ids, ids[: len(self._ids)].clamp(min=0)), dim=1)
        self._prompt = self._prompt or self._ids.shape[1]
        if self._biases and not (known and self._biases.constant):
            self._biases.write(self._bias, self._ids, self._ids.shape[1] - self._prompt)

    @property
    def graph_key(self) -> Hashable:
        """None: a step must not be captured, because it calls functions or keeps its logits."""
        if self._processors or self._record is not None:
            return None
        return self._any_samples, self._penalizes, self._ordered, bool(self._biases)

    @property
    def temperature(self) -> Tensor | None:
        """Temperatures :: [b], 0 for greedy rows; None: all rows are greedy.

        If `process` is not None, the temperature of rows that are not greedy is 1, because
        `process` already divides by their temperatures.
        """
        if not self._any_samples:
            return None
        return self._samples if self.process else self._temperature

    @property
    def seed(self) -> Tensor | None:
        return self._seed if self._any_samples else None

    @property
    def process(self) -> Callable[[Tensor], Tensor] | None:
        if self._record is not None:
            return self._process_and_record
        any_step = self._penalizes or self._ordered or self._biases or self._processors
        return self._process if any_step else None

    @property
    def nbytes(self) -> int:
        """Bytes of the seen tokens and the biases. All other tensors are small."""
        return self._seen.nbytes + self._bias.nbytes

    def _process_and_record(self, logits: Tensor) -> Tensor:
        assert self._record is not None
        texts, scores = len(self._ids), self._process(logits)
        self._record.append((logits[:texts].float(), scores[:texts]))
        return scores

    def _process(self, logits: Tensor) -> Tensor:
        """Applies each row's biases, penalty, temperature and filters to logits :: [b, vocab].

        Returns logits :: [b, vocab], fp32, which are -inf for tokens that are excluded.
        """
        logits = logits.float()
        if self._biases:
            logits = logits + self._bias
        if self._penalizes:
            penalty = self._penalty.unsqueeze(1)
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self._seen, penalised, logits)
        if self._processors:
            texts = self._call_processors(logits[: len(self._ids)])
            logits = torch.cat((texts, logits[len(self._ids) :]))
        logits = logits / self._divisor.unsqueeze(1)
        if self._ordered:
            logits = logits.masked_fill(logits < self._least_kept(logits), float("-inf"))
        return logits

    def _call_processors(self, logits: Tensor) -> Tensor:
        shape = logits.shape
        for processor in self._processors:
            logits = processor(self._ids, logits)
            if not isinstance(logits, Tensor) or logits.shape != shape:
                found = tuple(logits.shape) if isinstance(logits, Tensor) else f"{logits!r:.60}"
                raise ValueError(
                    f"the logits_processor {processor!r:.60} must return logits {tuple(shape)}, not"
                    f" {found}"
                )
        return logits.float()

    def _least_kept(self, logits: Tensor) -> Tensor:
        """Returns the lowest logit that each row's filters keep :: [b, 1], or -inf in a row whose
        filters keep all tokens."""
        likeliest = logits.topk(self._ordered).values  # [b, ordered], descending
        top_k, tail, best = self._top_k.unsqueeze(1), self._tail.unsqueeze(1), likeliest[:, :1]
        rank = torch.arange(self._ordered, device=logits.device)
        # A token is kept if its probability plus that of all less likely tokens is above 1 - top_p.
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
    "temperature": (lambda x: 1e-6 <= x <= 1e6, "0 (greedy), or from 1e-06 to 1e+06"),
    "top_k": (lambda x: isinstance(x, int) and x >= 0, "an integer from 0 (0 keeps all)"),
    "top_p": (lambda x: 0 <= x <= 1, "from 0 to 1"),
    "min_p": (lambda x: 0 <= x <= 1, "from 0 to 1"),
    "repetition_penalty": (lambda x: 0 < x < 1e38, "above 0 (1: no penalty)"),
    "no_repeat_ngram_size": (
        lambda x: isinstance(x, int) and x >= 0,
        "an integer from 0 (0: no limit)",
    ),
}
