"""Runs a model of PyTorch in a greedy loop, with a growing cache or a static one."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_fast.benchmarks.model.cases import NO_SIZES, PROMPT, Sizes


class Eager:
    """Runs the reference or a transformers model in the usual greedy loop, with a growing cache.

    Every provider has the methods of this class. It has one model and one cache. The tokens that
    the methods return are [b], on the device.
    """

    def __init__(self, model: Any, mask: Tensor | None = None) -> None:
        """mask :: [b, t], the prompt's attention mask: 0 for left padding"""
        self.model, self.mask = model, mask
        # transformers 5.24 renamed the cache, both as a keyword and in the output.
        renamed = "cache" in signature(model.forward).parameters
        self.cache = "cache" if renamed else "past_key_values"

    def start(self, batch: int, max_length: int, kind: str) -> None:
        """Prepares for sequences of up to max_length tokens.

        kind: what will be timed, cases.PROMPT or cases.NEW
        """
        self.past: Any = None

    def prefill(self, ids: Tensor) -> Tensor:
        """Empties the cache, reads ids :: [b, t] into it, and returns the next token."""
        self.past = None
        return self._read(ids)

    def extend(self, ids: Tensor) -> Tensor:
        """Appends ids :: [b, t] to the cache, and returns the next token."""
        if self.mask is not None:
            self.mask = F.pad(self.mask, (0, ids.shape[1]), value=1)
        return self._read(ids)

    def _read(self, ids: Tensor) -> Tensor:
        padding = {}
        if self.mask is not None:
            position_ids = positions(self.mask)[:, -ids.shape[1] :]
            padding = {"attention_mask": self.mask, "position_ids": position_ids}
        out = self._call(ids, self.past, logits_to_keep=1, **padding)
        self.past = getattr(out, self.cache)
        self.token: Tensor = out.logits[:, -1].argmax(-1)
        return self.token

    def step(self) -> Tensor:
        """Reads the last token and returns the next one. A later step may overwrite the tensor."""
        return self.extend(self.token[:, None])

    def logits(self, ids: Tensor) -> Tensor:
        """Appends ids :: [b, t] to the cache, and returns their logits :: [b, t, vocab]."""
        logits: Tensor = self._call(ids, self.past).logits
        return logits

    def _call(self, ids: Tensor, past: Any, **options: Any) -> Any:
        return self.model(ids, **{self.cache: past}, use_cache=True, **options)

    def memory(self) -> dict[str, float]:
        """Returns the provider's memory: purpose → bytes. It is empty if nothing is known."""
        return {}

    def sizes(self) -> Sizes:
        """Returns the tensors whose weights do not take the dtype's size: name → bytes a weight."""
        return NO_SIZES


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


class Static(Eager):
    """Runs transformers' fastest setup: a StaticCache, and the decode step compiled by
    torch.compile with a CUDA graph. As in transformers' generate(), prefill is not compiled."""

    def start(self, batch: int, max_length: int, kind: str) -> None:
        from transformers import StaticCache

        if kind == PROMPT:
            raise NotImplementedError("prefill is not compiled; see sdpa")
        self.past = None  # frees the old cache before the new cache is allocated
        self.past = StaticCache(config=self.model.config, max_cache_len=max_length)
        self.next = compiled_step(self._next)
        # Layers that read an earlier layer's K and V have no such attribute.
        self.windowed = [x for x in self.past.layers if getattr(x, "is_sliding", False)]

    def prefill(self, ids: Tensor) -> Tensor:
        self.past.reset()
        self.length = 0
        return self.extend(ids)

    def extend(self, ids: Tensor) -> Tensor:
        """Appends ids without compiled code: max-autotune would capture a graph per length."""
        self.length += ids.shape[1]
        self.position = torch.full((1, 1), self.length, device=ids.device)
        return super().extend(ids)

    def step(self) -> Tensor:
        """Decodes with at most two graphs. A windowed layer stores its length as a Python int, and
        torch.compile would compile the step again for each value. So, as in generate(), masks are
        made outside the compiled step; inside the step, the length is 0 or the window's length.
        """
        torch.compiler.cudagraph_mark_step_begin()
        token = self.token[:, None].clone()
        masks = self._masks(token)
        for layer in self.windowed:
            full = self.length >= layer.max_cache_len
            layer.cumulative_length_int = layer.max_cache_len if full else 0
        self.token = self.next(token, self.position, masks, self.past).clone()
        self.position += 1
        self.length += 1
        for layer in self.windowed:
            layer.cumulative_length_int = self.length
        return self.token

    def _next(self, token: Tensor, position: Tensor, masks: Any, past: Any) -> Tensor:
        out = self._call(token, past, attention_mask=masks, position_ids=position, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1)

    def _masks(self, token: Tensor) -> Any:
        if not self.windowed:
            return None
        from transformers.masking_utils import create_masks_for_generate

        config, dtype = self.model.config, self.model.dtype
        like = torch.empty(*token.shape, 0, dtype=dtype, device=token.device)
        return create_masks_for_generate(config, like, None, self.past, self.position)


class Rings(Static):
    """Like Static, but with gemma_fast.hf's cache, which stores every length in a tensor."""

    def start(self, batch: int, max_length: int, kind: str) -> None:
        from gemma_fast.hf import GemmaFastCache

        super().start(batch, max_length, kind)
        self.past = GemmaFastCache(self.model.config, max_length)
        self.windowed = []


def compiled_step(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiles the function in mode max-autotune, without graph breaks and dynamic shapes."""
    return torch.compile(function, mode="max-autotune", fullgraph=True, dynamic=False)
