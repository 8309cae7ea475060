"""Defines GemmaFastCache, a static cache for accelerated models. Layers with a window are rings.

Once the window is full, transformers' own static layers shift and copy all cached keys and values
for each token, and need a second compiled graph. In a ring, a new token overwrites the token that
leaves the window, in slot `position % slots`. Everything that changes between tokens is stored in
tensors, so one graph is enough.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, StaticCache
from transformers.cache_utils import StaticSlidingWindowLayer

from gemma_fast.hf.masks import RingOffset


class GemmaFastCache(StaticCache):
    """A StaticCache with rings: GemmaFastCache(model.config, max_cache_len). Pass it to `generate`
    or to the model as `past_key_values`.

    The model's attention must be accelerated, and the mask must be causal with padding on the left
    only, because transformers' own attention does not support rings. Otherwise the call raises
    ValueError, or fails an assertion on the device if the mask is first read inside a compiled
    graph. `reset()` empties the cache for the next text. Tokens cannot be removed from the cache.
    """

    def __init__(self, config: PreTrainedConfig, max_cache_len: int, **options: Any) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise ValueError(f"config must be model.config, not a {type(config).__name__}")
        if not isinstance(max_cache_len, int) or max_cache_len < 1:
            raise ValueError(f"{max_cache_len=} must be an integer of at least 1")
        super().__init__(config, max_cache_len, **options)
        # A cache smaller than the window never wraps, so it needs no ring. It must not be one: sdpa
        # builds no mask for so few keys, so RingOffset could not refuse a model that is not
        # accelerated.
        window = getattr(config.get_text_config(), "sliding_window", None)
        self.layers = [
            Ring(window, window)
            if isinstance(layer, StaticSlidingWindowLayer) and layer.max_cache_len == window
            else layer
            for layer in self.layers
        ]

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "GemmaFastCache cannot remove tokens, as assisted and prompt-lookup decoding require: "
            "use a DynamicCache"
        )


class Ring(StaticSlidingWindowLayer):
    """Stores keys, values :: [b, n, slots, d], each position in slot `position % slots`.

    For one new token, `update` returns the ring itself. For several, it returns a copy in order of
    position: keys and values of the window before the new tokens, then those of the new tokens.
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
        """Returns the number of keys that `update` returns, and the position of the first key. For
        one token this position is 0, because the keys are in the order of the slots."""
        if query_length == 1:
            return self.max_cache_len, RingOffset(0)
        before = self.max_cache_len - 1
        return before + query_length, RingOffset(self.cumulative_length - before)

    def get_seq_length(self) -> Any:
        return self.cumulative_length if self.is_initialized else 0
