"""What a call of the model brings, or a ValueError that says what is wrong with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma_fast.config import GemmaConfig
from gemma_fast.model.cache import KVCache


def check_ids(input_ids: Any, config: GemmaConfig, device: torch.device) -> Tensor:
    """input_ids :: [b, t] on the device."""
    if not isinstance(input_ids, Tensor):
        raise ValueError(f"input_ids must be a tensor, not a {type(input_ids).__name__}")
    kind = input_ids.dtype
    not_whole = kind.is_floating_point or kind.is_complex or kind == torch.bool
    if input_ids.ndim != 2 or not_whole:
        shape = tuple(input_ids.shape)
        raise ValueError(f"input_ids must be integers [batch, tokens], not {kind} {shape}")
    if not input_ids.numel():
        raise ValueError(f"the prompt is empty: input_ids is {tuple(input_ids.shape)}")
    input_ids = input_ids.to(device, torch.long)
    low, high = (int(x) for x in torch.aminmax(input_ids))
    if low < 0 or high >= config.vocab_size:
        token = low if low < 0 else high
        raise ValueError(f"token id {token} is outside the vocabulary of {config.vocab_size}")
    return input_ids


def check_cache(
    cache: Any, config: GemmaConfig, batch: int, dtype: torch.dtype, device: torch.device
) -> KVCache:
    """A cache that an earlier call of such a model returned."""
    if not isinstance(cache, KVCache):
        kind = type(cache).__name__
        raise ValueError(f"past_key_values must be a KVCache from an earlier call, not a {kind}")
    if cache.config != config:
        raise ValueError("past_key_values is the KVCache of a model with another config")
    made, needed = (cache.batch, cache.dtype, cache.device), (batch, dtype, device)
    if made != needed:
        raise ValueError(f"the cache is for {_words(*made)}, but this call is {_words(*needed)}")
    return cache


def check_logits_to_keep(given: Any) -> None:
    if not isinstance(given, int) or given < 0:
        raise ValueError(f"logits_to_keep={given!r} must be a whole number from 0 (all)")


def _words(batch: int, dtype: torch.dtype, device: torch.device) -> str:
    return f"a batch of {batch} in {str(dtype).removeprefix('torch.')} on {device}"
