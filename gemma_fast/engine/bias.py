"""`Bias` is a number that is added to the logit of one token. `Biases` adds those of a batch.

These options of transformers are biases: sequence_bias, bad_words_ids, suppress_tokens,
begin_suppress_tokens, min_new_tokens, min_length. `biases_of` reads them. The bias -inf excludes a
token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Bias(NamedTuple):
    """Adds `value` to the logit of the last token of `sequence` when the text ends in the other
    tokens of `sequence`. Applies to the first `until` new tokens of a text."""

    sequence: tuple[int, ...]
    value: float = -math.inf
    until: float = math.inf


class Biases:
    """The biases of all rows of a batch, as tensors.

    rows         biases of each row
    ngram_sizes  no_repeat_ngram_size of each row; 0: no limit
    """

    def __init__(
        self, rows: Sequence[tuple[Bias, ...]], ngram_sizes: Sequence[int], device: torch.device
    ) -> None:
        groups: dict[int, list[int]] = {}  # rows that share one tuple of biases
        for row, biases in enumerate(rows):
            groups.setdefault(id(biases), []).append(row)
        self._tables = [
            _Table.of(group, [x for x in rows[group[0]] if len(x.sequence) == length], device)
            for group in groups.values()
            for length in sorted({len(x.sequence) for x in rows[group[0]]})
        ]
        self._ngrams = {
            size: [row for row, other in enumerate(ngram_sizes) if other == size]
            for size in set(ngram_sizes) - {0}
        }
        self.constant = not self._ngrams and all(table.constant for table in self._tables)

    def __bool__(self) -> bool:
        return bool(self._tables or self._ngrams)

    def write(self, out: Tensor, ids: Tensor, new: int) -> None:
        """Writes the bias of each row's next token to out :: [b, vocab].

        ids  [b, t]: the tokens until now, left padding included
        new  number of tokens in ids that are not of the prompt
        """
        out.zero_()
        for table in self._tables:
            table.add_to(out, ids, new)
        for size, rows in self._ngrams.items():
            out[rows] = out[rows].masked_fill(_repeats(ids[rows], size, out.shape[1]), -math.inf)


class _Table(NamedTuple):
    """n biases of sequences of equal length, for r rows."""

    rows: Tensor  # [r]
    before: Tensor  # [n, length - 1]
    last: Tensor  # [n]
    value: Tensor  # [n]
    until: Tensor  # [n]
    constant: bool  # whether the biases of all new tokens are equal

    @classmethod
    def of(cls, rows: Sequence[int], biases: Sequence[Bias], device: torch.device) -> _Table:
        sequences, values, until = zip(*biases, strict=True)
        ids = torch.tensor(sequences, device=device)  # [n, length]
        return cls(
            torch.tensor(rows, device=device), ids[:, :-1], ids[:, -1],
            torch.tensor(values, dtype=torch.float32, device=device),
            torch.tensor(until, dtype=torch.float32, device=device),
            constant=ids.shape[1] == 1 and min(until) == math.inf,
        )  # fmt: skip

    def add_to(self, out: Tensor, ids: Tensor, new: int) -> None:
        start = ids.shape[1] - self.before.shape[1]
        if start < 0:
            return
        ends = ids[self.rows, start:].unsqueeze(1)  # [r, 1, length - 1]
        applies = (ends == self.before).all(-1) & (self.until > new)  # [r, n]
        value = self.value.where(applies, 0.0)  # [r, n]
        out.index_put_((self.rows.unsqueeze(1), self.last), value, accumulate=True)


def _repeats(ids: Tensor, size: int, vocab_size: int) -> Tensor:
    """Returns mask :: [b, vocab], True for tokens that would repeat an n-gram: `size` successive
    tokens that are already in the same row of ids :: [b, t]."""
    if ids.shape[1] < size:
        return torch.zeros(len(ids), vocab_size, dtype=torch.bool, device=ids.device)
    windows = ids.unfold(1, size, 1)  # [b, t - size + 1, size]
    last = ids[:, ids.shape[1] + 1 - size :].unsqueeze(1)  # [b, 1, size - 1]
    same = (windows[..., :-1] == last).all(-1)  # [b, t - size + 1]
    mask = torch.zeros(len(ids), vocab_size + 1, dtype=torch.bool, device=ids.device)
    mask.scatter_(1, windows[..., -1].where(same, vocab_size), True)
    return mask[:, :vocab_size]


def biases_of(
    options: Mapping[str, Any], eos: Sequence[int], prompt: int, vocab_size: int
) -> tuple[Bias, ...]:
    """Returns the biases of the options of generate() for a prompt of `prompt` tokens.

    eos  tokens that end a text, which min_new_tokens and min_length exclude

    Raises ValueError for a value of the wrong type, and for an id outside the vocabulary in
    sequence_bias and bad_words_ids. Other options ignore such an id, as in transformers.
    """
    found = [Bias(*pair) for pair in _sequence_bias(options.get("sequence_bias"), vocab_size)]
    given = options.get("bad_words_ids", ())
    words = [
        _ids("bad_words_ids", ids, vocab_size)
        for ids in (given if isinstance(given, list | tuple) else [given])
    ]
    found += [Bias(word) for word in words if word not in [(token,) for token in eos]]
    new = _count("min_new_tokens", options)
    if new is None:
        new = (_count("min_length", options) or 0) - prompt
    if new > 0:
        found += [Bias((token,), until=new) for token in eos]
    for name, until in (("suppress_tokens", math.inf), ("begin_suppress_tokens", 1)):
        given = options.get(name)
        tokens = () if given is None else _ids(name, given)
        found += [Bias((token,), until=until) for token in tokens if 0 <= token < vocab_size]
    return tuple(dict.fromkeys(found))


def _sequence_bias(given: Any, vocab_size: int) -> Iterable[tuple[tuple[int, ...], float]]:
    """Yields (sequence, value) of a dict {(id, …): value} or a list [[[id, …], value], …]."""
    items = given.items() if isinstance(given, Mapping) else () if given is None else given
    try:
        pairs = {tuple(ids): value for ids, value in items}
    except (TypeError, ValueError):
        pairs = {(): given}
    for ids, value in pairs.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and (value == -math.inf or abs(value) < 1e38)):
            raise ValueError(
                f"sequence_bias={given!r:.60} must be a dict {{(id, …): number}} or a list "
                "[[[id, …], number], …]"
            )
        yield _ids("sequence_bias", ids, vocab_size), value


def _ids(name: str, given: Any, vocab_size: int | None = None) -> tuple[int, ...]:
    """Returns the ids as a tuple. With vocab_size, they must be a sequence in the vocabulary."""
    try:
        ids = tuple(map(index, given.tolist() if isinstance(given, Tensor) else given))
    except TypeError:
        ids = None
    if ids is not None and (
        vocab_size is None or (ids and min(ids) >= 0 and max(ids) < vocab_size)
    ):
        return ids
    allowed = "integers" if vocab_size is None else f"token ids below {vocab_size}"
    raise ValueError(f"{name}: {given!r:.60} must be a list of {allowed}")


def _count(name: str, options: Mapping[str, Any]) -> int | None:
    given = options.get(name)
    count = as_int(given)
    if given is not None and (count is None or count < 0):
        raise ValueError(f"{name}={given!r:.60} must be an integer of at least 0")
    return count


def as_int(value: Any) -> int | None:
    """Returns the value of an int, a NumPy integer or a tensor with one integer. Returns None for
    any other value, for bool, and for an integer that does not fit int64."""
    try:
        number = index(value)
    except TypeError:
        return None
    return None if isinstance(value, bool) or not -(1 << 63) <= number < 1 << 63 else number
