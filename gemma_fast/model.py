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
import torch.nn.functional as F
from torch import Tensor, nn

from gemma_fast.cache import KVCache
from gemma_fast.checkpoint import Checkpoint, open_checkpoint
from gemma_fast.config import FULL, GemmaConfig
from gemma_fast.generate import generate_tokens
from gemma_fast.kernels.rmsnorm import add_rms_norm, rms_norm
from gemma_fast.layer import Layer, frozen, linear
from gemma_fast.load import pick_device, pick_dtype, refuse_head_dim, refuse_overflow, track_tensors


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

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.generation_config: Mapping[str, Any] = {}
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
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        device_map: str | Mapping[str, Any] | None = None,
    ) -> GemmaForCausalLM:
        """Reads a directory of safetensors, a .gguf file or a hub id.

        dtype       "auto": the checkpoint's; for GGUF bf16 on a GPU and float32 on the CPU
        device      None: the GPU if there is one, else the CPU
        device_map  for transformers' callers: "auto", a device, or {"": device}

        Config, tensor names, shapes and dtypes are checked before memory is taken for them; tensors
        then stream, one at a time. ValueError or FileNotFoundError name the file and the tensor.
        """
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
        """The model of a checkpoint that is open already; see `load.RandomCheckpoint`."""
        target = pick_device(device, None)
        kind = pick_dtype(dtype, checkpoint, target)
        refuse_overflow(checkpoint.config, kind)
        refuse_head_dim(checkpoint.config, target)
        with torch.device("meta"):
            model = cls(checkpoint.config).to(kind)
        model = model.to_empty(device=target)
        model.generation_config = checkpoint.generation_config
        model._load(checkpoint)
        return model

    def _load(self, checkpoint: Checkpoint) -> None:
        targets = {"model.embed_tokens.weight": self.embed_tokens, "model.norm.weight": self.norm}
        for layer in self.layers:
            for name, tensors in layer.parts.items():
                rows = [checkpoint.shapes[tensor][0] for tensor in tensors]
                if rows:
                    targets |= zip(tensors, getattr(layer, name).split(rows), strict=True)
        for tensor in track_tensors(targets, f"Reading {checkpoint.path.name}"):
            checkpoint.copy(tensor, targets[tensor])

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.dtype

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutput:
        """Next-token logits after each token.

        input_ids        [b, t], integers; t tokens that follow those in past_key_values
        attention_mask   [b, past + t], 0 for padding on the left (or, of a finished text, on the
                         right); None: no padding
        position_ids     [b, t], for transformers' callers: what the mask says, or ValueError
        past_key_values  the KVCache of an earlier call; it is extended in place
        use_cache        False: return no cache. Default: return one
        logits_to_keep   1: only the last token's logits; 0: all
        """
        input_ids = self.check_ids(input_ids)
        if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
            raise ValueError(f"{logits_to_keep=} must be a whole number from 0 (all)")
        b, t = input_ids.shape
        cache = past_key_values
        if cache is None:
            cache = KVCache(self.config, b, t, dtype=self.dtype, device=self.device, grows=True)
        if not isinstance(cache, KVCache):
            kind = type(cache).__name__
            raise ValueError(
                f"past_key_values must be a KVCache from an earlier call, not a {kind}"
            )
        if cache.config != self.config:
            raise ValueError("past_key_values is the KVCache of a model with another config")
        made, needed = (cache.batch, cache.dtype, cache.device), (b, self.dtype, self.device)
        if made != needed:
            raise ValueError(
                f"the cache is for {_words(*made)}, but this call is {_words(*needed)}"
            )
        cache.reserve(t)  # before the cache learns of the padding
        cache.align(t, attention_mask, position_ids)
        hiddens = self.hidden_states(input_ids, cache)
        logits = self.logits(hiddens[:, -logits_to_keep:])
        return CausalLMOutput(logits, None if use_cache is False else cache)

    def hidden_states(self, input_ids: Tensor, cache: KVCache) -> Tensor:
        """input_ids :: [b, t] → [b, t, hidden] after the final norm; the cache advances by t."""
        t = input_ids.shape[1]
        cache.reserve(t)
        cache.stale = "a pass over it did not finish"  # until advance()
        start = cache.next_position
        angles = self._angles(start, t)
        eps = self.config.rms_norm_eps
        residual = self.embed(input_ids)
        next_norms = [layer.input_layernorm for layer in self.layers[1:]] + [self.norm]
        x = rms_norm(residual, self.layers[0].input_layernorm, eps)
        for layer, next_norm in zip(self.layers, next_norms, strict=True):
            x = layer.attend(x, *angles[self.config.layer_types[layer.index]], start, cache)
            x, residual = add_rms_norm(
                x, residual,
                layer.pre_feedforward_layernorm, layer.post_attention_layernorm, eps,
            )  # fmt: skip
            x = layer.mlp(x)
            x, residual = add_rms_norm(
                x, residual, next_norm, layer.post_feedforward_layernorm, eps
            )
        cache.advance(t)
        return x

    def embed(self, input_ids: Tensor) -> Tensor:
        """input_ids :: [b, t] → [b, t, hidden], times sqrt(hidden)."""
        # Rounded to the model's dtype, as in training: sqrt(640) is 25.25 in bf16.
        scale = torch.tensor(self.config.hidden_size**0.5, dtype=self.dtype)
        return F.embedding(input_ids, self.embed_tokens) * scale

    def logits(self, hiddens: Tensor) -> Tensor:
        """hiddens :: [..., hidden] → [..., vocab]: the embedding serves both ends."""
        # One matrix: of a strided batch F.linear makes a batched product and copies the weights.
        rows = hiddens.reshape(-1, hiddens.shape[-1])
        logits = linear(rows, self.embed_tokens).view(*hiddens.shape[:-1], -1)
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits

    def check_ids(self, input_ids: Tensor) -> Tensor:
        """input_ids on the model's device, or a ValueError that says what is wrong with them."""
        refuse_overflow(self.config, self.dtype)
        if not isinstance(input_ids, Tensor):
            raise ValueError(f"input_ids must be a tensor, not a {type(input_ids).__name__}")
        kind = input_ids.dtype
        not_whole = kind.is_floating_point or kind.is_complex or kind == torch.bool
        if input_ids.ndim != 2 or not_whole:
            shape = tuple(input_ids.shape)
            raise ValueError(f"input_ids must be integers [batch, tokens], not {kind} {shape}")
        if not input_ids.numel():
            raise ValueError(f"the prompt is empty: input_ids is {tuple(input_ids.shape)}")
        input_ids = input_ids.to(self.device, torch.long)
        low, high = (int(x) for x in torch.aminmax(input_ids))
        if low < 0 or high >= self.config.vocab_size:
            token = low if low < 0 else high
            raise ValueError(
                f"token id {token} is outside the vocabulary of {self.config.vocab_size}"
            )
        return input_ids

    def _angles(self, start: Tensor, t: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Kind of layer → cos, sin :: [b, t, d / 2], fp32, of position * theta^(-2i / d)."""
        config, device = self.config, start.device
        positions = (start.unsqueeze(1) + torch.arange(t, device=device)).unsqueeze(2).float()
        i = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
        angles = {}
        for kind in set(config.layer_types):
            full = kind == FULL
            theta = config.rope_theta if full else config.rope_local_base_freq
            inv_freq = 1 / theta ** (i / config.head_dim)
            angle = positions * (inv_freq / config.rope_scaling_factor if full else inv_freq)
            angles[kind] = angle.cos(), angle.sin()
        return angles


Gemma2ForCausalLM = Gemma3ForCausalLM = GemmaForCausalLM


def _words(batch: int, dtype: torch.dtype, device: torch.device) -> str:
    return f"a batch of {batch} in {str(dtype).removeprefix('torch.')} on {device}"
