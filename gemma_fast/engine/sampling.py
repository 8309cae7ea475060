"""`Sampling` stores the sampling settings of one text. sampler.py applies them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gemma_fast.engine.bias import Bias


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
        return self.follows_text or self.repetition_penalty != 1

    @property
    def follows_text(self) -> bool:
        """True if the logits of the next token depend on the text by biases or n-grams."""
        return bool(self.biases or self.no_repeat_ngram_size)

    def filtered_tokens(self, vocab_size: int) -> int:
        """Returns how many of the top logits the filters need in order; 0: there are no filters."""
        if not self.do_sample or (self.top_k, self.top_p, self.min_p) == (0, 1, 0):
            return 0
        return min(self.top_k or (vocab_size if self.top_p < 1 else 1), vocab_size)


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
