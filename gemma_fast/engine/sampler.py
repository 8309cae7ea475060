"""`Sampler` stores the sampling settings and the newest token of each row of a batch.

The settings apply in the same order as in transformers: biases, repetition penalty, the caller's
functions (`Processor`), temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from copy import copy

import torch
from torch import Tensor

from gemma_fast.engine.bias import Biases
from gemma_fast.engine.sampling import Sampling

# Function from ids :: [b, t], left padding included, and logits :: [b, vocab], fp32, to new logits.
Processor = Callable[[Tensor, Tensor], Tensor]
LEAST_ORDERED = 64  # least number of top logits that are sorted for the filters
GREEDY = Sampling()


class _Texts:
    """Texts of successive rows that have the same number of tokens.

    ids     [r, t]: their tokens until now, left padding included
    prompt  number of tokens of the prompt
    """

    def __init__(self, rows: slice, texts: Sequence[Sampling], device: torch.device) -> None:
        self.rows, self.prompt = rows, 0
        self.ids = torch.zeros(len(texts), 0, dtype=torch.int64, device=device)
        sizes = [text.no_repeat_ngram_size for text in texts]
        self.biases = Biases([text.biases for text in texts], sizes, device)

    def follow(self, ids: Tensor, bias: Tensor) -> None:
        """Appends ids :: [r, t], and writes the biases of the next tokens to bias :: [r, vocab]."""
        known = self.ids.shape[1]
        self.ids = torch.cat((self.ids, ids.clamp(min=0)), dim=1)
        self.prompt = self.prompt or self.ids.shape[1]
        if self.biases and not (known and self.biases.constant):
            self.biases.write(bias, self.ids, self.ids.shape[1] - self.prompt)


class Sampler:
    """Stores each row's sampling settings and newest token, for `Gemma.step`.

    token      [b], int64: the newest token of each row; -1: the token's logits were not finite
    logits     [b, vocab], fp32: logits of the model for the newest tokens, if a row keeps them
    invariant  True: logits are always processed in the same way, whatever the settings of other
               rows, so that a row's token does not depend on them

    Everything that changes between replays of a CUDA graph is stored in tensors with fixed
    addresses. A graph is valid for one value of `graph_key` only. `follow` runs outside the graph.
    """

    invariant = False

    def __init__(self, batch: int, vocab_size: int, device: torch.device) -> None:
        def setting(dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(batch, dtype=dtype, device=device)

        self.token, self._seed, self._top_k = (setting(torch.int64) for _ in range(3))
        self._temperature, self._divisor, self._samples = (setting() for _ in range(3))
        self._penalty, self._tail, self._log_min_p = (setting() for _ in range(3))
        # These are [b, vocab] from the first time that they are needed.
        self._seen = torch.zeros(0, dtype=torch.bool, device=device)
        self._bias, self.logits, self._scores = (
            torch.zeros(0, dtype=torch.float32, device=device) for _ in range(3)
        )
        self._vocab_size = vocab_size
        self.set([])

    def set(
        self, texts: Sequence[Sampling], processors: Sequence[Processor] = (),
        keeps_logits: bool = False,
    ) -> None:  # fmt: skip
        """Sets the settings of the first len(texts) rows, for new texts; all other rows are greedy.

        processors    get the logits of the first len(texts) rows
        keeps_logits  keep the logits of each step, see `kept`
        """
        batch = len(self.token)
        self._rows = [*texts, *[GREEDY] * (batch - len(texts))]
        self._keeps = [keeps_logits] * batch
        self._processors = processors
        self._write(slice(0, batch))
        self.token.zero_()
        self._groups: list[_Texts] = []
        if processors or any(text.follows_text for text in texts):
            self._groups = [_Texts(slice(0, len(texts)), texts, self.token.device)]

    def set_row(self, row: int, text: Sampling, ids: Tensor, keeps_logits: bool = False) -> None:
        """Sets the settings of one row, for a new text with the prompt ids :: [1, t], which may be
        on the host."""
        rows = slice(row, row + 1)
        self._rows[row], self._keeps[row] = text, keeps_logits
        self._groups = [group for group in self._groups if group.rows != rows]
        self._write(rows)
        if self._bias.numel():
            self._bias[rows] = 0
        if text.follows_text:
            group = _Texts(rows, [text], self.token.device)
            self._groups.append(group)
            group.follow(ids.to(self.token.device), self._bias[rows])
        if text.repetition_penalty != 1:
            self._seen[rows].scatter_(1, ids.to(self.token.device), True)

    def clear_row(self, row: int) -> None:
        """Makes a row without a text greedy."""
        self.set_row(row, GREEDY, self.token.new_zeros(1, 0))

    def move_row(self, source: int, target: int) -> None:
        """Copies a text's settings and newest token to another row, which then has the text."""
        for value in self._tensors().values():
            if value.numel():
                value[target] = value[source]
        self._rows[target], self._keeps[target] = self._rows[source], self._keeps[source]
        for group in self._groups:
            if group.rows.start == source:
                group.rows = slice(target, target + 1)
        self._summarize()

    def clear(self) -> None:
        """Forgets the functions and the ids of the last texts."""
        self._processors, self._groups = (), []

    def _write(self, rows: slice) -> None:
        """Writes the settings of these rows to their tensors."""
        texts, vocab_size = self._rows[rows], self._vocab_size
        values: list[tuple[Tensor, list[float]]] = [
            (self._seed, [text.seed for text in texts]),
            (self._samples, [float(text.do_sample) for text in texts]),
            (self._temperature, [text.temperature * text.do_sample for text in texts]),
            (self._divisor, [text.temperature if text.do_sample else 1.0 for text in texts]),
            (self._penalty, [text.repetition_penalty for text in texts]),
            (self._top_k, [min(text.top_k or vocab_size, vocab_size) for text in texts]),
            (self._tail, [1 - text.top_p for text in texts]),  # probability that top_p may drop
            (self._log_min_p, [math.log(x.min_p) if x.min_p else -math.inf for x in texts]),
        ]
        for setting, row_values in values:
            if len(row_values) == 1:
                value = row_values[0]
                # A copy would wait for the GPU.
                setting[rows].fill_(float(value) if setting.is_floating_point() else value)
            else:
                setting[rows] = torch.tensor(row_values, dtype=setting.dtype, device="cpu")
        self._summarize()
        if self._penalizes:
            self._seen = self._of_all_tokens(self._seen)
            self._seen[rows] = False
        if any(text.follows_text for text in texts):
            self._bias = self._of_all_tokens(self._bias)
        if self._keeps_logits:
            self.logits, self._scores = map(self._of_all_tokens, (self.logits, self._scores))

    def _summarize(self) -> None:
        """Sets the properties of the step, which are those of all rows together."""
        rows, vocab_size = self._rows, self._vocab_size
        self._any_samples = any(text.do_sample for text in rows)
        self._penalizes = any(text.repetition_penalty != 1 for text in rows)
        self._biased = any(text.follows_text for text in rows)
        self._keeps_logits = any(self._keeps)
        # Number of top logits that are sorted for the filters; 0: there are no filters.
        ordered = max(text.filtered_tokens(vocab_size) for text in rows)
        if ordered:
            # Few different numbers, because each needs its own CUDA graph.
            rounded = max(LEAST_ORDERED, 1 << (ordered - 1).bit_length())
            ordered = vocab_size if self.invariant else min(rounded, vocab_size)
        self._ordered = ordered
        self._views: dict[int, Sampler] = {}

    def _of_all_tokens(self, setting: Tensor) -> Tensor:
        if setting.numel():
            return setting
        with torch.inference_mode(False):
            return setting.new_zeros(len(self.token), self._vocab_size)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def rows(self, rows: slice) -> Sampler:
        """Returns a sampler of these rows in the same memory. Changes of settings make it
        invalid."""
        part = copy(self)
        for name, value in self._tensors().items():
            setattr(part, name, value[rows])
        part._rows, part._keeps = self._rows[rows], self._keeps[rows]
        part._summarize()
        return part

    def first_rows(self, count: int) -> Sampler:
        """Returns a sampler of the first `count` rows, as `rows` does."""
        if count == len(self.token):
            return self
        if count not in self._views:
            self._views[count] = self.rows(slice(0, count))
        return self._views[count]

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
        for group in self._groups:
            group.follow(ids[group.rows], self._bias[group.rows])

    @property
    def graph_key(self) -> Hashable:
        """None: a step must not be captured, because it calls functions."""
        if self._processors:
            return None
        flags = self._any_samples, self._penalizes, self._biased, self._keeps_logits
        return *flags, self._ordered, self.invariant

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
        if self._keeps_logits:
            return self._process_and_keep
        steps = self._penalizes or self._ordered or self._biased or self._processors
        return self._process if steps or self.invariant else None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that have a value for each token of the vocabulary."""
        return sum(x.nbytes for x in (self._seen, self._bias, self.logits, self._scores))

    def kept(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Returns copies of the logits of the model, and of the processed logits :: [r, vocab],
        fp32, of the newest tokens. The rows must keep their logits."""
        return self.logits[rows].clone(), self._scores[rows].clone()

    def _process_and_keep(self, logits: Tensor) -> Tensor:
        scores = self._process(logits)
        self.logits.copy_(logits)
        self._scores.copy_(scores)
        return scores

    def _process(self, logits: Tensor) -> Tensor:
        """Applies each row's biases, penalty, temperature and filters to logits :: [b, vocab].

        Returns logits :: [b, vocab], fp32, which are -inf for tokens that are excluded.
        """
        logits = logits.float()
        if self._biased:
            logits = logits + self._bias
        if self._penalizes:
            penalty = self._penalty.unsqueeze(1)
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self._seen, penalised, logits)
        if self._processors:
            ids = self._groups[0].ids
            logits = torch.cat((self._call_processors(ids, logits[: len(ids)]), logits[len(ids) :]))
        logits = logits / self._divisor.unsqueeze(1)
        if self._ordered:
            logits = logits.masked_fill(logits < self._least_kept(logits), float("-inf"))
        return logits

    def _call_processors(self, ids: Tensor, logits: Tensor) -> Tensor:
        shape = logits.shape
        for processor in self._processors:
            logits = processor(ids, logits)
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
