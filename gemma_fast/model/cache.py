"""`KVCache` stores the keys and values of all layers in preallocated memory.

Each layer has a ring of slots: slot `p % slots` stores position p. The ring of a full layer has a
slot for every position, so it never wraps. The ring of a layer with a window of W tokens has at
most W slots, so its memory does not grow with the context. Unless it is W, the number of slots is a
multiple of BLOCK, because the attention kernel copies blocks of keys. Layers that read an earlier
layer's keys and values (Gemma 4) have no ring.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_fast.config import GemmaConfig, LayerShape
from gemma_fast.kernels.matvec import MAX_ROWS
from gemma_fast.model.padding import check_position_ids, check_shape, left_padding
from gemma_fast.model.rope import Rope

BLOCK = 128  # slots per block: a multiple of the kernels' key blocks, a divisor of Gemma's windows
PAUSED = -(
    1 << 30
)  # position of paused rows; a step adds 1, so it remains negative for 2**30 steps


@dataclass
class _Row:
    """State of one sequence that is stored on the host."""

    length: int = 0
    unfinished: str | None = None  # reason why K and V of the newest positions may be missing
    right_padded: bool = False
    paused: bool = False


class KVCache:
    """Stores keys and values of `batch` sequences (rows) of up to `max_length` tokens each.

    keys, values  :: list with one [b, n, slots, d] per layer with keys and values of its own; n, d
                     and slots are the layer's
    next_position :: [b], int32: position of each row's next token; negative while a row is still in
                     its left padding, or paused
    angles        :: layer type → cos, sin :: [≥ max_length, d / 2], fp32, see rope.py
    counter       :: [≥ b * n for all n, ≥ MAX_ROWS], int32, zeros: kernels count their finished
                     programs here

    All these tensors are on the device. If the cache is full, `reserve` doubles its length, up to
    the model's context; with grows=False it raises ValueError instead. All caches of a model share
    the tables of `rope`.
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
            raise ValueError(f"{batch=} and {max_length=} must both be at least 1")
        self.config, self.grows, self._rope = config, grows, rope or Rope(config)
        self._layers = _own_layers(config)
        shapes = [(batch, x.num_key_value_heads, 0, x.head_dim) for x in self._layers]
        self.keys, self.values = (
            [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes] for _ in "kv"
        )
        self.next_position = torch.zeros(batch, dtype=torch.int32, device=device)
        counters = max(MAX_ROWS, *(batch * n for _, n, _, _ in shapes))
        self.counter = torch.zeros(counters, dtype=torch.int32, device=device)
        self._rows = [_Row() for _ in range(batch)]
        self._allocate(max_length)

    @property
    def batch(self) -> int:
        return len(self._rows)

    @property
    def length(self) -> int:
        """Number of tokens in the longest row, left padding included."""
        return max(row.length for row in self._rows)

    def get_seq_length(self) -> int:
        """Returns `length`, under transformers' name."""
        return self.length

    @property
    def stale(self) -> str | None:
        """The reason why the cache cannot be continued, or None if it can."""
        for row in self._rows:
            if row.unfinished or row.right_padded:
                return row.unfinished or "it contains padding on the right"
        return None

    @property
    def dtype(self) -> torch.dtype:
        return self.keys[0].dtype

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values on the device."""
        return sum(x.nbytes for x in (*self.keys, *self.values))

    @staticmethod
    def bytes_needed(config: GemmaConfig, batch: int, max_length: int, dtype: torch.dtype) -> int:
        """Returns `nbytes` of a cache with these settings."""
        values = sum(
            x.num_key_value_heads * _slots(x.window, max_length) * x.head_dim
            for x in _own_layers(config)
        )
        return 2 * batch * values * dtype.itemsize

    def rows(self, rows: int | slice) -> KVCache:
        """Returns a cache of these rows that shares this cache's memory and token counts.

        A cache with `grows=True` does not support this method.
        """
        assert not self.grows, "a cache that grows reallocates, so its rows cannot be shared"
        index = slice(rows, rows + 1) if isinstance(rows, int) else rows
        assert self._rows[index], f"there are no rows {rows} in a batch of {self.batch}"
        part = copy(self)
        part._rows, part.next_position = self._rows[index], self.next_position[index]
        part.keys = [keys[index] for keys in self.keys]
        part.values = [values[index] for values in self.values]
        return part

    def clear(self) -> None:
        """Empties all rows. Sets all slots to 0: unused slots must be finite, see _allocate."""
        for x in (self.next_position, *self.keys, *self.values):
            x.zero_()
        for row in self._rows:
            row.length, row.unfinished, row.right_padded, row.paused = 0, None, False, False

    def pause(self) -> None:
        """Makes forward passes treat the rows as padding, so that their tokens stay as they are."""
        self.next_position.fill_(PAUSED)
        for row in self._rows:
            row.paused = True

    def resume(self) -> None:
        """Ends the pause of the rows, which must have no left padding."""
        for i, row in enumerate(self._rows):
            self.next_position[i] = row.length
            row.paused = False

    def copy_from(self, other: KVCache) -> None:
        """Replaces the rows by those of another cache with the same batch and max_length."""
        for target, source in zip(
            (*self.keys, *self.values), (*other.keys, *other.values), strict=True
        ):
            used = min(_whole_blocks(other.length), source.shape[2])
            target[:, :, :used] = source[:, :, :used]
        self.next_position.copy_(other.next_position)
        for row, source_row in zip(self._rows, other._rows, strict=True):
            vars(row).update(vars(source_row))

    def angles_of(self, tokens: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns layer type → cos, sin :: [b, tokens, d / 2] of the next tokens.

        If `tokens` is 1, returns the whole tables :: [≥ max_length, d / 2] instead, because
        decode_attention indexes the tables by position.
        """
        if tokens == 1:
            return self.angles
        position = self._positions(0, tokens).clamp(min=0)
        return {kind: (cos[position], sin[position]) for kind, (cos, sin) in self.angles.items()}

    def reserve(self, tokens: int) -> None:
        """Ensures that each row has room for `tokens` more tokens. Raises ValueError if these
        tokens do not fit, or if the cache is `stale`."""
        if self.stale:
            raise ValueError(f"this cache cannot be continued: {self.stale}; start with a new one")
        needed = self.length + tokens
        sizes = f"{self.length} tokens so far and {tokens} more do not fit"
        context = self.config.max_position_embeddings
        if needed > context:
            raise ValueError(f"{sizes} the model's context of {context}")
        if needed > self.max_length:
            if not self.grows:
                raise ValueError(
                    f"{sizes} the cache of {self.max_length}: create one with max_length={needed}"
                )
            self._allocate(min(max(needed, 2 * self.max_length), context))

    def align(
        self, tokens: int, attention_mask: Tensor | None, position_ids: Tensor | None = None
    ) -> None:
        """Sets each row's next position from the left padding in attention_mask.

        attention_mask :: [b, length + tokens] covers past and new tokens. If it is given, all rows
        must have the same number of tokens. Raises ValueError, and leaves the cache unchanged, if
        the mask has holes or the wrong shape, if it disagrees with an earlier mask, or if
        position_ids :: [b, tokens] differ from the new tokens' positions.
        """
        columns, device = self.length + tokens, self.next_position.device
        position, right_padded = self.next_position, [False] * self.batch
        real = torch.ones(self.batch, columns, dtype=torch.bool, device=device)
        if attention_mask is not None:
            assert len({row.length for row in self._rows}) == 1, "rows differ in length"
            real = check_shape("attention_mask", attention_mask, real).bool()
            padding = left_padding(real)
            position = (self.length - padding).int()
            # A row that is still in its left padding (position <= 0) may get more padding.
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
        """Context for code that writes to the rows. If the code raises, the rows keep `reason`,
        so the cache is `stale`. In nested contexts, the rows keep the outermost reason.
        """
        before = [row.unfinished for row in self._rows]
        for row in self._rows:
            if not row.paused:  # nothing is written to paused rows
                row.unfinished = row.unfinished or reason
        yield
        for row, reason_before in zip(self._rows, before, strict=True):
            row.unfinished = reason_before

    def rings(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Returns the rings of K and V to which the caller must write the next `tokens` tokens.

        If the layer's own rings do not wrap, returns views of them. Otherwise returns temporary
        longer rings, which already contain the past keys and values that the next tokens see.
        """
        keys, values = self.keys[layer], self.values[layer]
        slots = keys.shape[2]
        used = self.length + tokens
        if used <= slots:
            # A ring that has not wrapped remains valid if it is cut after its last used block.
            used = min(_whole_blocks(used), slots)
            return keys[:, :, :used], values[:, :, :used]
        past = min(self.length, slots - 1)
        b, n, _, d = keys.shape
        shape = b, n, _whole_blocks(past + tokens), d
        # Zeros, because unused slots must be finite, see _allocate.
        longer = keys.new_zeros(shape), values.new_zeros(shape)
        positions = self._positions(-past, 0)
        _move(keys, longer[0], positions)
        _move(values, longer[1], positions)
        return longer

    def keep(self, layer: int, keys: Tensor, values: Tensor, tokens: int) -> None:
        """Copies the newest positions of temporary rings from `rings` to the layer's own rings.

        Does nothing if `rings` returned the layer's own rings.
        """
        slots = self.keys[layer].shape[2]
        if keys.shape[2] > slots:
            positions = self._positions(tokens - slots, tokens)
            _move(keys, self.keys[layer], positions)
            _move(values, self.values[layer], positions)

    def advance(self, tokens: int) -> None:
        """Increases the token counts of all rows by `tokens`. The caller has already written the K
        and V of these tokens to the rings.

        The counts of unused rows increase unless they are paused, so an unused row must be cleared
        before it is full.
        """
        self.next_position += tokens
        self.count(tokens)

    def count(self, tokens: int) -> None:
        """Adds `tokens` to the counts on the host only, because a replayed CUDA graph adds them to
        next_position."""
        for row in self._rows:
            row.length += 0 if row.paused else tokens

    def _positions(self, first: int, last: int) -> Tensor:
        """Returns each row's positions :: [b, last - first], from next_position + first to
        next_position + last - 1."""
        offsets = torch.arange(first, last, device=self.next_position.device)
        return self.next_position.unsqueeze(1) + offsets

    def _allocate(self, max_length: int) -> None:
        self.max_length = max_length
        self.angles = self._rope.tables(max_length, self.next_position.device)
        for layer, shape in enumerate(self._layers):
            slots = _slots(shape.window, max_length)
            for rings in (self.keys, self.values):
                b, n, used, d = rings[layer].shape
                if slots > used:
                    # Attention multiplies unused slots by 0, so they must be finite.
                    longer = rings[layer].new_zeros(b, n, slots, d)
                    longer[:, :, :used] = rings[layer]
                    rings[layer] = longer


def _own_layers(config: GemmaConfig) -> list[LayerShape]:
    """Returns the layers with keys and values of their own. They come before all others."""
    return [layer for i, layer in enumerate(config.layers) if layer.kv_layer == i]


def _slots(window: int | None, max_length: int) -> int:
    whole = _whole_blocks(max_length)
    return min(window or whole, whole)


def _whole_blocks(slots: int) -> int:
    return -(-slots // BLOCK) * BLOCK


def _move(source: Tensor, target: Tensor, positions: Tensor) -> None:
    """Copies the slots of positions :: [b, p] from a ring [b, n, slots, d] to a ring of another
    length."""
    row = torch.arange(positions.shape[0], device=positions.device).unsqueeze(1)
    target[row, :, positions % target.shape[2]] = source[row, :, positions % source.shape[2]]
