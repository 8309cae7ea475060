"""KVCache: every key and value the model has computed, preallocated; positions live on the device.

A layer's cache is a ring: slot `p % slots` holds position p. A layer that sees everything has a
slot for each position of the context and never wraps; one that sees a window of W has W slots, so
its memory does not grow with the context. Any other ring ends on a whole block, because the
attention kernel copies blocks of keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_fast.config import GemmaConfig
from gemma_fast.model.padding import check_position_ids, check_shape, left_padding
from gemma_fast.model.rope import Rope

BLOCK = 128  # slots; a multiple of the kernel's blocks, a divisor of Gemma's windows


@dataclass
class _Row:
    """The host's state of a sequence."""

    length: int = 0
    unfinished: str | None = None  # why its newest positions may not be there
    right_padded: bool = False


class KVCache:
    """Room for `max_length` tokens in each of `batch` sequences.

    keys, values  :: one [b, n, slots, d] a layer
    next_position :: [b], int32: where each row's next token stands; negative while a row is still
                     in its left padding
    angles        :: kind of layer → cos, sin :: [≥ max_length, d / 2], fp32, see rope.py
    counter       :: [≥ b * n] zeros, int32: kernels count their programs there

    A cache with `grows=True` doubles when it is full, up to the model's context; any other raises a
    ValueError. `rope`: tables to share with other caches of the model.
    """

    def __init__(
        self,
        config: GemmaConfig,
        batch: int,
        max_length: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        grows: bool = False,
        rope: Rope | None = None,
    ) -> None:
        if batch < 1 or max_length < 1:
            raise ValueError(f"a cache for {batch=} and {max_length=} holds nothing")
        self.config, self.grows, self._rope = config, grows, rope or Rope(config)
        self._windows = [config.window(i) for i in range(config.num_hidden_layers)]
        shape = (batch, config.num_key_value_heads, 0, config.head_dim)
        empty = torch.zeros(shape, dtype=dtype, device=device)
        self.keys, self.values = ([empty] * len(self._windows) for _ in "kv")
        self.next_position = torch.zeros(batch, dtype=torch.int32, device=device)
        self.counter = torch.zeros(shape[0] * shape[1], dtype=torch.int32, device=device)
        self._rows = [_Row() for _ in range(batch)]
        self._allocate(max_length)

    @property
    def batch(self) -> int:
        return len(self._rows)

    @property
    def length(self) -> int:
        """Tokens seen by the longest row, left padding included."""
        return max(row.length for row in self._rows)

    def get_seq_length(self) -> int:
        """`length`, by transformers' name."""
        return self.length

    @property
    def stale(self) -> str | None:
        """Why it cannot be continued; None: it can."""
        for row in self._rows:
            if row.unfinished or row.right_padded:
                return row.unfinished or "it holds padding on the right as tokens"
        return None

    @property
    def dtype(self) -> torch.dtype:
        return self.keys[0].dtype

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    @property
    def nbytes(self) -> int:
        """Bytes that keys and values take on the device."""
        return sum(x.nbytes for x in (*self.keys, *self.values))

    @staticmethod
    def bytes_needed(config: GemmaConfig, batch: int, max_length: int, dtype: torch.dtype) -> int:
        """`nbytes` of such a cache."""
        windows = (config.window(i) for i in range(config.num_hidden_layers))
        slots = sum(_slots(window, max_length) for window in windows)
        return 2 * batch * config.num_key_value_heads * slots * config.head_dim * dtype.itemsize

    def rows(self, rows: int | slice) -> KVCache:
        """A cache of these rows in the same memory: what is written to it, and what it counts, this
        one has too. Not of a cache that grows."""
        assert not self.grows, "a cache that grows moves to other memory"
        index = slice(rows, rows + 1) if isinstance(rows, int) else rows
        assert self._rows[index], f"there are no rows {rows} in a batch of {self.batch}"
        part = copy(self)
        part._rows, part.next_position = self._rows[index], self.next_position[index]
        part.keys = [keys[index] for keys in self.keys]
        part.values = [values[index] for values in self.values]
        return part

    def clear(self) -> None:
        """Ready for new texts. Zeros, because what it held need not be finite: see _allocate."""
        for x in (self.next_position, *self.keys, *self.values):
            x.zero_()
        for row in self._rows:
            row.length, row.unfinished, row.right_padded = 0, None, False

    def angles_of(self, tokens: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Kind of layer → cos, sin of the next tokens, [b, t, d / 2]; of one token, the table."""
        if tokens == 1:
            return self.angles
        position = self._positions(0, tokens).clamp(min=0)
        return {kind: (cos[position], sin[position]) for kind, (cos, sin) in self.angles.items()}

    def reserve(self, tokens: int) -> None:
        """Makes sure that `tokens` more fit. ValueError: they do not, or the cache is `stale`."""
        if self.stale:
            raise ValueError(f"this cache cannot be continued, {self.stale}: start with a new one")
        needed = self.length + tokens
        sizes = f"{self.length} tokens so far and {tokens} more do not fit"
        context = self.config.max_position_embeddings
        if needed > context:
            raise ValueError(f"{sizes} the model's context of {context}")
        if needed > self.max_length:
            if not self.grows:
                raise ValueError(
                    f"{sizes} the cache of {self.max_length}: make one with max_length={needed}"
                )
            self._allocate(min(max(needed, 2 * self.max_length), context))

    def align(
        self, tokens: int, attention_mask: Tensor | None, position_ids: Tensor | None = None
    ) -> None:
        """Takes the next tokens' left padding from a mask over all columns, past and new ones. With
        a mask all rows must have seen as many tokens.

        ValueError: a mask of another shape, with holes, or that disagrees with an earlier one;
        position_ids that do not count the tokens which the mask leaves. The cache stays as it was.
        """
        columns, device = self.length + tokens, self.next_position.device
        position, right_padded = self.next_position, [False] * self.batch
        real = torch.ones(self.batch, columns, dtype=torch.bool, device=device)
        if attention_mask is not None:
            assert len({row.length for row in self._rows}) == 1, "rows have seen other numbers"
            real = check_shape("attention_mask", attention_mask, real).bool()
            padding = left_padding(real)
            position = (self.length - padding).int()
            # A row still in its padding, at 0 or below, may stay there.
            if not torch.equal(position.clamp(min=0), self.next_position.clamp(min=0)):
                raise ValueError("attention_mask disagrees with the padding of the cached tokens")
            right_padded = (real.any(1) & ~real[:, -1]).tolist()
        if position_ids is not None:
            expected = position.unsqueeze(1) + torch.arange(tokens, device=device)
            check_position_ids(position_ids, expected, real[:, -tokens:])
        self.next_position.copy_(position)
        for row, padded in zip(self._rows, right_padded, strict=True):
            row.right_padded = padded

    @contextmanager
    def unfinished(self, reason: str) -> Iterator[None]:
        """Around what writes to the rows: an exception in it leaves them stale, for this reason or
        for that of an `unfinished` around this one."""
        before = [row.unfinished for row in self._rows]
        for row in self._rows:
            row.unfinished = row.unfinished or reason
        yield
        for row, reason_before in zip(self._rows, before, strict=True):
            row.unfinished = reason_before

    def rings(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Where the next tokens' K and V go: the layer's own rings where nothing that those tokens
        still see would be overwritten, else longer ones that begin with what they still see."""
        keys, values = self.keys[layer], self.values[layer]
        slots = keys.shape[2]
        used = self.length + tokens
        if used <= slots:
            # Up to its last used block a ring that has not wrapped is a shorter ring.
            used = min(_whole_blocks(used), slots)
            return keys[:, :, :used], values[:, :, :used]
        past = min(self.length, slots - 1)
        b, n, _, d = keys.shape
        shape = b, n, _whole_blocks(past + tokens), d
        longer = keys.new_zeros(shape), values.new_zeros(shape)  # finite: see _allocate
        positions = self._positions(-past, 0)
        _move(keys, longer[0], positions)
        _move(values, longer[1], positions)
        return longer

    def keep(self, layer: int, keys: Tensor, values: Tensor, tokens: int) -> None:
        """Brings the newest positions back from longer rings, if those are what `rings` gave."""
        slots = self.keys[layer].shape[2]
        if keys.shape[2] > slots:
            positions = self._positions(tokens - slots, tokens)
            _move(keys, self.keys[layer], positions)
            _move(values, self.values[layer], positions)

    def advance(self, tokens: int) -> None:
        """The next tokens are in the rings of all rows. One without a text counts too: `clear` it
        before it is full."""
        self.next_position += tokens
        self.count(tokens)

    def count(self, tokens: int) -> None:
        """The host's part of `advance`: all of it for a pass that a CUDA graph replays."""
        for row in self._rows:
            row.length += tokens

    def _positions(self, first: int, last: int) -> Tensor:
        """[b, last - first] positions, counted from each row's next one."""
        offsets = torch.arange(first, last, device=self.next_position.device)
        return self.next_position.unsqueeze(1) + offsets

    def _allocate(self, max_length: int) -> None:
        self.max_length = max_length
        self.angles = self._rope.tables(max_length, self.next_position.device)
        for layer, window in enumerate(self._windows):
            slots = _slots(window, max_length)
            for rings in (self.keys, self.values):
                b, n, used, d = rings[layer].shape
                if slots > used:
                    # Zeros, because what was never written is weighted by zero: it must be finite.
                    longer = rings[layer].new_zeros(b, n, slots, d)
                    longer[:, :, :used] = rings[layer]
                    rings[layer] = longer


def _slots(window: int | None, max_length: int) -> int:
    whole = _whole_blocks(max_length)
    return min(window or whole, whole)


def _whole_blocks(slots: int) -> int:
    return -(-slots // BLOCK) * BLOCK


def _move(source: Tensor, target: Tensor, positions: Tensor) -> None:
    """Copies positions :: [b, p] of one ring [b, n, slots, d] into another."""
    row = torch.arange(positions.shape[0], device=positions.device).unsqueeze(1)
    target[row, :, positions % target.shape[2]] = source[row, :, positions % source.shape[2]]
