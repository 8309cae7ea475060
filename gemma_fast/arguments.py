"""Checks the tensors that callers pass to a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma_fast.engine.bias import as_int
from gemma_fast.load import refuse_overflow
from gemma_fast.model.cache import KVCache
from gemma_fast.model.gemma import Gemma


def ids_of(input_ids: Any, model: Gemma, device: torch.device | None = None) -> Tensor:
    """Returns input_ids :: [b, t], int64, on the device, by default the model's. Raises ValueError
    unless input_ids is a non-empty tensor of integers within the vocabulary."""
    refuse_overflow(model.config, model.dtype)
    if not isinstance(input_ids, Tensor):
        raise ValueError(
            f"input_ids must be a tensor, not a {type(input_ids).__name__}: call"
            ' tokenizer(text, return_tensors="pt"), and unpack its result, as in'
            " generate(**inputs)"
        )
    kind = input_ids.dtype
    not_whole = kind.is_floating_point or kind.is_complex or kind == torch.bool
    if input_ids.ndim != 2 or not_whole:
        shape = tuple(input_ids.shape)
        raise ValueError(f"input_ids must be integers [batch, tokens], not {kind} {shape}")
    if not input_ids.numel():
        raise ValueError(f"the prompt is empty: input_ids is {tuple(input_ids.shape)}")
    low, high = (int(x) for x in torch.aminmax(input_ids))
    if low < 0 or high >= model.config.vocab_size:
        token = low if low < 0 else high
        vocabulary = model.config.vocab_size
        raise ValueError(f"token id {token} is outside the vocabulary of {vocabulary}")
    return input_ids.to(device or model.device, torch.long)


def as_row(input_ids: Any) -> Any:
    """Returns the ids of one prompt as a tensor [1, t], if they are a list of integers or a tensor
    [t]."""
    if isinstance(input_ids, list | tuple):
        if any(as_int(token) is None for token in input_ids):
            raise ValueError(f"input_ids={input_ids!r:.60} must be token ids")
        input_ids = torch.tensor(input_ids, dtype=torch.long, device="cpu")
    flat = isinstance(input_ids, Tensor) and input_ids.ndim == 1
    return input_ids.unsqueeze(0) if flat else input_ids


def checked_cache(cache: Any, batch: int, model: Gemma) -> KVCache:
    """Returns the cache. Raises ValueError unless it is a KVCache for this config, batch size,
    dtype and device."""
    if not isinstance(cache, KVCache):
        kind = type(cache).__name__
        raise ValueError(f"past_key_values must be a KVCache from an earlier call, not a {kind}")
    if cache.config != model.config:
        raise ValueError("past_key_values is the KVCache of a model with another config")
    made, call = (cache.batch, cache.dtype, cache.device), (batch, model.dtype, model.device)
    if made != call:
        has, needs = (f"a batch of {b} in {dtype} on {where}" for b, dtype, where in (made, call))
        text = f"the cache is for {has}, but this call is {needs}"
        raise ValueError(text.replace("torch.", ""))
    return cache
