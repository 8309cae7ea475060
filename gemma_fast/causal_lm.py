"""GemmaForCausalLM: the walk-through's steps on the kernels, over a KV cache.

    token ids → embed → layers (attention, MLP) → final norm → logits

A residual is added by the norm that reads it next. Each kernel picks Triton on a GPU, and its
reference elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gemma_fast.checkpoint.base import Checkpoint
from gemma_fast.checkpoint.open import open_checkpoint
from gemma_fast.checkpoint.transformers import TransformersCheckpoint
from gemma_fast.checks import check_cache, check_ids, check_logits_to_keep
from gemma_fast.compat import FORWARD, FROM_PRETRAINED, check_keywords
from gemma_fast.config import GemmaConfig
from gemma_fast.engine.decoder import Decoders
from gemma_fast.engine.generate import generate_tokens
from gemma_fast.engine.request import GenerationConfig
from gemma_fast.kernels.attention import HEAD_DIMS
from gemma_fast.kernels.embed import embed
from gemma_fast.kernels.lm_head import next_token
from gemma_fast.kernels.matvec import norm_linear
from gemma_fast.load import load_model, pick_device, refuse_overflow
from gemma_fast.model.cache import KVCache
from gemma_fast.model.layer import Layer, frozen


class CausalLMOutput(NamedTuple):
    logits: Tensor  # [b, t, vocab], or its last `logits_to_keep` rows
    past_key_values: KVCache | None


class GemmaForCausalLM(nn.Module):
    """Gemma 1, 2 or 3 (text), with the call, `generate` and result that transformers' class has.

    Weights are frozen: the kernels have no backward. A new instance's are uninitialised; see
    `from_pretrained` and `from_checkpoint`. state_dict() has the fused products, so it is for
    another instance, not a checkpoint.
    """

    generate = generate_tokens
    head_dims = HEAD_DIMS  # the kernels' on a GPU

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.generation_config = GenerationConfig()
        self.decoders = Decoders()
        self.embed_tokens = frozen(config.vocab_size, config.hidden_size)
        self.layers: Sequence[Layer] = nn.ModuleList(  # type: ignore[assignment]
            Layer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = frozen(config.hidden_size)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        torch_dtype: torch.dtype | str | None = None,
        **others: Any,
    ) -> GemmaForCausalLM:
        """Reads a directory of safetensors, a .gguf file or a hub id.

        dtype       None or "auto": the checkpoint's; for GGUF bf16 on a GPU, float32 on the CPU
        device      None: the GPU if there is one, else the CPU
        device_map  for transformers' callers: "auto", a device, or {"": device}; torch_dtype is
                    dtype's older name, `keywords.FROM_PRETRAINED` lists the others that are taken

        Config, tensor names, shapes and dtypes are checked before memory is taken for them; tensors
        then stream, one at a time. ValueError or FileNotFoundError name the file and the tensor.
        """
        check_keywords("from_pretrained()", others, FROM_PRETRAINED)
        if dtype is not None and torch_dtype is not None:
            raise TypeError("from_pretrained() got dtype and torch_dtype, which name the same")
        dtype = dtype or torch_dtype or "auto"
        checkpoint = open_checkpoint(name_or_path)
        return cls.from_checkpoint(checkpoint, dtype=dtype, device=pick_device(device, device_map))

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
    ) -> GemmaForCausalLM:
        """The model of a checkpoint that is open already; see `checkpoint.random`."""
        model = load_model(cls, checkpoint, dtype, device)
        model.generation_config = GenerationConfig(checkpoint.generation_config)
        return model

    @classmethod
    def from_transformers(cls, model: nn.Module) -> GemmaForCausalLM:
        """The text model of a live Gemma of transformers: its weights, dtype, device and
        generation_config.

        The embedding, norms, o_proj and down_proj are shared: a change in place is seen by both
        models, until one is moved or converted. The projections that are fused here are copied, q,
        k, v, gate and up, which is 2.60 GB of Gemma 2B's 5.01 in 16 bits: build anew after
        training. They are shared, too, where they are adjacent in memory.

        ValueError: the model is not one that `checkpoint.transformers` takes.
        """
        return cls.from_checkpoint(TransformersCheckpoint(model))

    @property
    def parts(self) -> dict[str, list[str]]:
        """Parameter → the checkpoint's tensors that are stacked in it."""
        parts = {"embed_tokens": ["model.embed_tokens.weight"], "norm": ["model.norm.weight"]}
        for i, layer in enumerate(self.layers):
            parts |= {f"layers.{i}.{name}": x for name, x in layer.parts.items() if x}
        return parts

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.dtype

    def _apply(self, fn: Any, recurse: bool = True) -> GemmaForCausalLM:
        self.decoders.clear()  # graphs know weights by their addresses
        return super()._apply(fn, recurse)

    def memory(self) -> dict[str, int]:
        """Bytes on the device: weights, and what `generate` keeps for its next call, caches and
        CUDA graphs. `free_memory` frees the latter two."""
        kept = [decoder.memory() for decoder in self.decoders.values()]
        return {
            "weights": sum(weight.nbytes for weight in self.parameters()),
            "cache": sum(x["cache"] for x in kept),
            "graph": sum(x["graph"] for x in kept),
        }

    def free_memory(self) -> None:
        """Drops the caches and CUDA graphs that `generate` keeps."""
        self.decoders.clear()

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **others: Any,
    ) -> CausalLMOutput:
        """Next-token logits after each token.

        input_ids        [b, t], integers; t tokens that follow those in past_key_values
        attention_mask   [b, past + t], 0 for padding on the left (or, of a finished text, on the
                         right); None: no padding
        position_ids     [b, t], for transformers' callers: what the mask says, or ValueError
        past_key_values  the KVCache of an earlier call; it is extended in place
        use_cache        False: return no cache. Default: return one
        logits_to_keep   1: only the last token's logits; 0: all
        others           `keywords.FORWARD`: transformers' that change nothing here
        """
        check_keywords("forward()", others, FORWARD)
        input_ids = self.check_ids(input_ids)
        check_logits_to_keep(logits_to_keep)
        b, t = input_ids.shape
        if past_key_values is None:
            cache = KVCache(self.config, b, t, dtype=self.dtype, device=self.device, grows=True)
        else:
            cache = check_cache(past_key_values, self.config, b, self.dtype, self.device)
        cache.reserve(t)  # before the cache learns of the padding
        cache.align(t, attention_mask, position_ids)
        x, residual = self.hidden_states(input_ids, cache)
        logits = self.logits(x[:, -logits_to_keep:], residual[:, -logits_to_keep:])
        return CausalLMOutput(logits, None if use_cache is False else cache)

    def hidden_states(self, input_ids: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        """input_ids :: [b, t] → x, residual :: [b, t, hidden], whose sum, x normalised first where
        there are post-norms, is what the final norm takes; the cache advances by t."""
        t = input_ids.shape[1]
        cache.reserve(t)
        cache.stale = "a pass over it did not finish"  # until advance()
        start, angles = cache.next_position, cache.angles_of(t)
        x = embed(input_ids, self.embed_tokens, self.config.hidden_size**0.5, prefetch=True)
        residual = post_norm = None
        for layer in self.layers:
            x, residual = layer(x, residual, post_norm, angles, start, cache)
            post_norm = layer.post_feedforward_layernorm
        assert residual is not None
        cache.advance(t)
        return x, residual

    def logits(self, x: Tensor, residual: Tensor) -> Tensor:
        """x, residual :: [..., hidden] → [..., vocab]: the embedding serves both ends."""
        logits, _ = norm_linear(
            x, residual, *self._final_norms, self.embed_tokens, eps=self.config.rms_norm_eps
        )
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits

    def next_token(
        self,
        x: Tensor,
        residual: Tensor,
        position: Tensor,
        token: Tensor,
        arrived: Tensor,
        temperature: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> None:
        """x, residual :: [b, hidden] → token :: [b], in place: the likeliest, or one drawn."""
        next_token(
            x, residual, *self._final_norms, self.embed_tokens, position, token, arrived,
            temperature, seed, softcap=self.config.final_logit_softcapping,
            eps=self.config.rms_norm_eps, prefetch=True,
        )  # fmt: skip

    @property
    def _final_norms(self) -> tuple[Tensor, Tensor | None]:
        return self.norm, self.layers[-1].post_feedforward_layernorm

    def check_ids(self, input_ids: Tensor | None) -> Tensor:
        """input_ids on the model's device, or a ValueError that says what is wrong with them."""
        refuse_overflow(self.config, self.dtype)
        return check_ids(input_ids, self.config, self.device)


AutoModelForCausalLM = Gemma2ForCausalLM = Gemma3ForCausalLM = GemmaForCausalLM
