"""GemmaFastCache: a static cache for accelerated models whose windowed layers are rings.

transformers' own static layers shift and copy a whole window for each token once it is full, and
compile to one graph before and another after. In a ring a token takes the slot of the one that
leaves the window, `position % slots`, and all that changes lies in tensors: one graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, StaticCache
from transformers.cache_utils import StaticSlidingWindowLayer

from gemma_fast.hf.attention import RingOffset


class GemmaFastCache(StaticCache):
    """StaticCache(config, max_cache_len) with rings. Give it to `generate` or to the model as
    `past_key_values`.

    The model must be accelerated, with its attention, and its mask be causal with padding on the
    left: where a ring begins, no other attention knows. All else is a ValueError; a mask that is
    first read within a compiled CUDA graph, PyTorch's assertion on the device. `reset()` empties it
    for the next text. As of any static cache, nothing can be taken back from it.
    """

    def __init__(self, config: PreTrainedConfig, max_cache_len: int, **options: Any) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise ValueError(f"config must be model.config, not a {type(config).__name__}")
        if not isinstance(max_cache_len, int) or max_cache_len < 1:
            raise ValueError(f"{max_cache_len=} must be a whole number from 1")
        super().__init__(config, max_cache_len, **options)
        self.layers = [
            Ring(layer.max_cache_len, layer.max_cache_len)
            if isinstance(layer, StaticSlidingWindowLayer)
            else layer
            for layer in self.layers
        ]

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "a static cache takes nothing back, as assisted and prompt-lookup decoding want it to: "
            "use a DynamicCache"
        )


class Ring(StaticSlidingWindowLayer):
    """keys, values :: [b, n, slots, d]: slot `position % slots` holds that position.

    One token's attention is over the ring as it lies; that of more, over a copy in their order of
    the window before them, and themselves.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        t, slots = key_states.shape[2], self.max_cache_len
        assert self.keys is not None and self.values is not None
        keys, values = self.keys, self.values
        if t > 1:
            past = torch.arange(1 - slots, 0, device=self.device) + self.cumulative_length
            keys = torch.cat((keys[:, :, past % slots], key_states), dim=2)
            values = torch.cat((values[:, :, past % slots], value_states), dim=2)
        new = torch.arange(max(t - slots, 0), t, device=self.device) + self.cumulative_length
        self.keys.index_copy_(2, new % slots, key_states[:, :, -slots:])
        self.values.index_copy_(2, new % slots, value_states[:, :, -slots:])
        self.cumulative_length.add_(t)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        """Length, and the position of the first key; of the whole ring 0: positions are slots."""
        if query_length == 1:
            return self.max_cache_len, RingOffset(0)
        before = self.max_cache_len - 1
        return before + query_length, RingOffset(self.cumulative_length - before)

    def get_seq_length(self) -> Any:
        return self.cumulative_length if self.is_initialized else 0
