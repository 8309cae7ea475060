"""Providers of a whole model: implementations that prefill a prompt and decode greedily.

    provider = PROVIDERS["gemma_fast"](checkpoint, torch.bfloat16, device)
    provider.start(batch=1, max_length=640, kind=NEW)
    token = provider.prefill(ids)  # ids :: [b, t] → [b]
    token = provider.step()  # the next token; does not wait for the GPU

For the case `Arrival` there are other providers, which continue many prompts:

    provider = ARRIVAL_PROVIDERS["gemma_fast"](checkpoint, torch.bfloat16, device)
    provider.start(batch=8, max_length=640, kind=ARRIVAL)
    texts = provider.texts(prompts, 128)  # 128 new tokens for each prompt

A provider imports its packages when it is created, so a missing package stops only this provider.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from gemma_fast.benchmarks.measure.outcome import (
    EAGER,
    GENERATE_BATCH,
    LLAMA_CPP,
    ONE_BY_ONE,
    OURS,
    TRANSFORMERS,
    UNPACKED,
)
from gemma_fast.benchmarks.model.cases import Sizes
from gemma_fast.benchmarks.model.eager import Eager, Rings, Static
from gemma_fast.benchmarks.model.generate_batch import GenerateBatch
from gemma_fast.benchmarks.model.llama import LlamaCpp
from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.checkpoint.base import Checkpoint
from gemma_fast.engine.decoder import Decoder
from gemma_fast.reference import Reference


class Ours:
    """Runs gemma_fast's Decoder, which on a GPU replays a CUDA graph for each step."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device,
        quantize: str | None = None,
    ) -> None:  # fmt: skip
        self.model = GemmaForCausalLM.from_checkpoint(
            checkpoint, dtype=dtype, device=device, quantize=quantize
        )

    def start(self, batch: int, max_length: int, kind: str) -> None:
        self.batch = batch
        self.decoder: Any = None  # frees the old decoder before the new one is created
        self.decoder = Decoder(self.model, batch, max_length)

    def prefill(self, ids: Tensor) -> Tensor:
        self.decoder.prefill(ids)
        return self.decoder.token

    def extend(self, ids: Tensor) -> Tensor:
        self.decoder.extend(ids)
        return self.decoder.token

    def step(self) -> Tensor:
        self.decoder.step()
        return self.decoder.token

    def logits(self, ids: Tensor) -> Tensor:
        cache = self.decoder.cache.rows(slice(0, self.batch))  # the cache may have more rows
        return self.model(ids, past_key_values=cache).logits

    def memory(self) -> dict[str, float]:
        return self.decoder.memory()

    def sizes(self) -> Sizes:
        sizes: dict[str, float] = {}
        for name, tensors in self.model.parts.items():
            weight = attrgetter(name)(self.model)
            sizes |= dict.fromkeys(tensors, weight.nbytes / weight.numel())
        return sizes


class Many(Ours):
    """Gives all prompts to gemma_fast's generate_many."""

    def start(self, batch: int, max_length: int, kind: str) -> None:
        self.batch = batch
        self.model.decoders.clear()  # those of another batch size

    def texts(self, prompts: Sequence[list[int]], new: int) -> list[list[int]]:
        """Returns the `new` tokens that follow each prompt."""
        requests = [{"input_ids": ids} for ids in prompts]
        texts: list[list[int]] = [[] for _ in prompts]
        for found in self.model.generate_many(
            requests, batch_size=self.batch, max_new_tokens=new, eos_token_id=None
        ):
            if found.error is not None:
                raise found.error
            texts[found.number] = found.ids
        return texts

    def memory(self) -> dict[str, float]:
        return {**self.model.decoders.memory()}


class OneByOne(Many):
    """Calls gemma_fast's generate for one prompt after another."""

    def texts(self, prompts: Sequence[list[int]], new: int) -> list[list[int]]:
        options: dict[str, Any] = {"max_new_tokens": new, "eos_token_id": None}
        ids = [torch.tensor([prompt], device=self.model.device) for prompt in prompts]
        return [self.model.generate(x, **options)[0, x.shape[1] :].tolist() for x in ids]


Provider = Eager | Ours | LlamaCpp
Loader = Callable[[Checkpoint, torch.dtype, torch.device], Any]  # returns a provider


def _reference(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Provider:
    return Eager(Reference.from_checkpoint(checkpoint, dtype=dtype, device=device))


def _transformers(
    attention: str, loop: type[Eager | GenerateBatch] = Eager, kernels: bool = False
) -> Loader:
    def load(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Any:
        from gemma_fast.benchmarks.model.transformers_model import transformers_model

        chosen = attention
        if attention == "sdpa" and checkpoint.config.attn_logit_softcapping:
            if loop is Eager and not kernels:
                raise NotImplementedError("no soft cap")
            chosen = "eager"  # unlike sdpa, eager attention applies the soft cap
        model = transformers_model(checkpoint, chosen, dtype=dtype, device=device)
        if kernels:
            from gemma_fast.hf import accelerate

            accelerate(model)
        return loop(model)

    return load


STATIC = "transformers (static cache, torch.compile max-autotune)"
RINGS = "gemma_fast.hf (rings, torch.compile max-autotune)"
BESIDE_PACKED = (UNPACKED, LLAMA_CPP)  # run only for packed weights, unless named
# Providers with a dtype of their own: the dtype of their logits, and the size of K and V.
OWN_DTYPES: dict[str, list[torch.dtype]] = {LLAMA_CPP: [torch.bfloat16]}
# The providers run in this order. Compiled providers come last, because they take minutes.
PROVIDERS: dict[str, Loader] = {
    EAGER: _reference,
    "transformers (eager)": _transformers("eager"),
    TRANSFORMERS: _transformers("sdpa"),
    "gemma_fast.hf": _transformers("sdpa", kernels=True),
    OURS: Ours,
    UNPACKED: partial(Ours, quantize="none"),
    LLAMA_CPP: LlamaCpp,
    STATIC: _transformers("sdpa", Static),
    RINGS: _transformers("sdpa", Rings, kernels=True),
}
# Providers that continue many prompts, for the case `Arrival`.
ARRIVAL_PROVIDERS: dict[str, Loader] = {
    OURS: Many,
    UNPACKED: partial(Many, quantize="none"),
    ONE_BY_ONE: OneByOne,
    GENERATE_BATCH: _transformers("sdpa", GenerateBatch),
}


def providers_of(arrival: bool) -> dict[str, Loader]:
    """Returns the providers of the case `Arrival`, or those of the other cases."""
    return ARRIVAL_PROVIDERS if arrival else PROVIDERS
