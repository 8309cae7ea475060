"""KVCache: every key and value the model has computed, preallocated; positions live on the device.

A layer's cache is a ring: slot `p % slots` holds position p. A layer that sees everything has a
slot for each position of the context and never wraps; one that sees a window of W has W slots, so
its memory does not grow with the context. Any other ring ends on a whole block, because the
attention kernel copies blocks of keys.
"""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from gemma_fast.config import FULL, GemmaConfig

BLOCK = 128  # slots; a multiple of the kernel's blocks, a divisor of Gemma's windows


class KVCache:
    """Room for `max_length` tokens in each of `batch` sequences.

    keys, values  :: one [b, n, slots, d] a layer
    next_position :: [b], int32: where each row's next token stands; negative while a row is still
                     in its left padding
    length        :: tokens seen by the longest row, padding included
    stale         :: None, or why it cannot be continued
    angles        :: kind of layer → cos, sin :: [max_length, d / 2], fp32, of a position's angles
    arrived       :: [b * n] zeros, int32: kernels count their programs there

    A cache with `grows=True` doubles when it is full, up to the model's context; any other raises a
    ValueError.
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
    ) -> None:
        if batch < 1 or max_length < 1:
            raise ValueError(f"a cache for {batch=} and {max_length=} holds nothing")
        self.config, self.batch, self.grows = config, batch, grows
        self._windows = [config.window(i) for i in range(config.num_hidden_layers)]
        shape = (batch, config.num_key_value_heads, 0, config.head_dim)
        empty = torch.zeros(shape, dtype=dtype, device=device)
        self.keys, self.values = ([empty] * len(self._windows) for _ in "kv")
        self.next_position = torch.zeros(batch, dtype=torch.int32, device=device)
        self.arrived = torch.zeros(shape[0] * shape[1], dtype=torch.int32, device=device)
        self.length = 0
        self.stale: str | None = None
        self._right_padded = False
        self._allocate(max_length)

    def get_seq_length(self) -> int:
        """Tokens seen so far, left padding included (transformers' name)."""
        return self.length

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
        """What `nbytes` of such a cache would be."""
        windows = (config.window(i) for i in range(config.num_hidden_layers))
        slots = sum(_slots(window, max_length) for window in windows)
        return 2 * batch * config.num_key_value_heads * slots * config.head_dim * dtype.itemsize

    def clear(self) -> None:
        """Ready for new texts. Zeros, because what it held need not be finite: see _allocate."""
        for x in (self.next_position, *self.keys, *self.values):
            x.zero_()
        self.length, self.stale, self._right_padded = 0, None, False

    def first_rows(self, batch: int) -> KVCache:
        """A cache of the first rows, in the same memory; this one's `length` does not follow."""
        part = copy(self)
        part.batch, part.next_position = batch, self.next_position[:batch]
        part.keys = [keys[:batch] for keys in self.keys]
        part.values = [values[:batch] for values in self.values]
        return part

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
        """Takes the next tokens' left padding from a mask over all columns, past and new ones.

        ValueError: a mask of another shape, with holes, or that disagrees with an earlier one;
        position_ids that do not count the tokens which the mask leaves. The cache stays as it was.
        """
        columns, device = self.length + tokens, self.next_position.device
        position = self.next_position
        real = torch.ones(self.batch, columns, dtype=torch.bool, device=device)
        if attention_mask is not None:
            real = _check_shape("attention_mask", attention_mask, real).bool()
            position = self._first_position(real)
        if position_ids is not None:
            offsets = torch.arange(tokens, device=device)
            expected = position.unsqueeze(1) + offsets
            given = _check_shape("position_ids", position_ids, expected)
            new = real[:, -tokens:]
            if not torch.equal(given[new].long(), expected[new]):
                raise ValueError(
                    "position_ids must count on from the cache, padding left out: "
                    f"expected {expected.tolist()}, got {position_ids.tolist()}"
                )
        self.next_position.copy_(position)
        self._right_padded = bool((real.any(1) & ~real[:, -1]).any())

    def _first_position(self, real: Tensor) -> Tensor:
        """real :: [b, columns], False for padding → where each row's next token stands."""
        columns = real.shape[1]
        column = torch.arange(columns, device=real.device)
        count = real.sum(1)
        padding = torch.where(count > 0, real.int().argmax(1), columns)
        last = padding + count
        whole = (column >= padding.unsqueeze(1)) & (column < last.unsqueeze(1))
        if not torch.equal(real, whole):
            raise ValueError("attention_mask has holes: only padding on one side is supported")
        position = (self.length - padding).int()
        # A row still in its padding, at 0 or below, may stay there.
        if not torch.equal(position.clamp(min=0), self.next_position.clamp(min=0)):
            raise ValueError("attention_mask disagrees with the padding of the cached tokens")
        return position

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
        self.next_position += tokens
        self.length += tokens
        self.stale = "it holds padding on the right as tokens" if self._right_padded else None

    def _positions(self, first: int, last: int) -> Tensor:
        """[b, last - first] positions, counted from each row's next one."""
        offsets = torch.arange(first, last, device=self.next_position.device)
        return self.next_position.unsqueeze(1) + offsets

    def _allocate(self, max_length: int) -> None:
        self.max_length = max_length
        self.angles = _angles(self.config, max_length, self.next_position.device)
        for layer, window in enumerate(self._windows):
            slots = _slots(window, max_length)
            for rings in (self.keys, self.values):
                b, n, used, d = rings[layer].shape
                if slots > used:
                    # Zeros, because what was never written is weighted by zero: it must be finite.
                    longer = rings[layer].new_zeros(b, n, slots, d)
                    longer[:, :, :used] = rings[layer]
                    rings[layer] = longer


def _angles(
    config: GemmaConfig, positions: int, device: torch.device
) -> dict[str, tuple[Tensor, Tensor]]:
    """Kind of layer → cos, sin :: [positions, d / 2], fp32, of position * theta^(-2i / d)."""
    position = torch.arange(positions, device=device).unsqueeze(1).float()
    i = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    angles = {}
    for kind in set(config.layer_types):
        full = kind == FULL
        theta = config.rope_theta if full else config.rope_local_base_freq
        inv_freq = 1 / theta ** (i / config.head_dim)
        angle = position * (inv_freq / config.rope_scaling_factor if full else inv_freq)
        angles[kind] = angle.cos(), angle.sin()
    return angles


def _slots(window: int | None, max_length: int) -> int:
    whole = _whole_blocks(max_length)
    return min(window or whole, whole)


def _whole_blocks(slots: int) -> int:
    return -(-slots // BLOCK) * BLOCK


def _move(source: Tensor, target: Tensor, positions: Tensor) -> None:
    """Copies positions :: [b, p] of one ring [b, n, slots, d] into another."""
    row = torch.arange(positions.shape[0], device=positions.device).unsqueeze(1)
    target[row, :, positions % target.shape[2]] = source[row, :, positions % source.shape[2]]


def _check_shape(name: str, given: Tensor, like: Tensor) -> Tensor:
    """`given` on `like`'s device, or a ValueError."""
    shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
    if shape != like.shape:
        raise ValueError(f"{name} must be a tensor of {tuple(like.shape)}, not {shape}")
    return given.to(like.device)
