"""The walk-through in bare PyTorch: token ids to next-token logits, one plain step after another.

Every test compares with it, and it is "eager" in every benchmark. It shares no code with the model
and the kernels.

    b batch · t new tokens · s tokens so far, past included · n kv heads · m query heads per kv head
    d head dim

Follows Graphcore Research's "A transformer walk-through, with Gemma"; numerics as in Google's
gemma_pytorch and transformers: RMSNorm, angles and softmax in fp32, all else in the weights' dtype.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_fast.checkpoint.base import Checkpoint
from gemma_fast.checkpoint.open import open_checkpoint
from gemma_fast.config import FULL, GemmaConfig


def embed(input_ids: Tensor, embeddings: Tensor) -> Tensor:
    """Rows of the embedding, times sqrt(hidden) rounded to the weights' dtype: [b, t, hidden]."""
    scale = torch.tensor(embeddings.shape[1] ** 0.5).to(embeddings.dtype)
    return embeddings[input_ids] * scale.to(embeddings.device)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * (1 + weight), all in fp32, rounded once."""
    z = wide(x)
    z = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + eps)
    return (z * (1 + wide(weight))).to(x.dtype)


def angles(config: GemmaConfig, positions: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """cos and sin :: [b, 1, t, d / 2] of position * theta^(-2i / d), in fp32, on a kind of layer;
    positions :: [b, t]"""
    full = kind == FULL
    theta = config.rope_theta if full else config.rope_local_base_freq
    i = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device)
    inv_freq = 1 / theta ** (i / config.head_dim)
    if full:
        inv_freq = inv_freq / config.rope_scaling_factor
    angles = positions[:, None, :, None].float() * inv_freq
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns channel i of x :: [b, heads, t, d] against channel i + d / 2, in fp32."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def attend(
    q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """softmax(cap(scale * q @ keysᵀ)) @ values :: [b, heads, t, d], the softmax in fp32.

    q :: [b, heads, t, d]; keys, values :: [b, n, s, d]; visible :: [b or 1, t, s], bool
    """
    m = q.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(m, dim=1) for x in (keys, values))
    scores = cap(q @ keys.transpose(2, 3) * scale, softcap)  # [b, heads, t, s]
    scores = scores.masked_fill(~visible[:, None], torch.finfo(scores.dtype).min)
    return wide(scores).softmax(-1).to(q.dtype) @ values


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def cap(x: Tensor, softcap: float | None) -> Tensor:
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def wide(x: Tensor) -> Tensor:
    """In fp32 at least."""
    return x if x.dtype == torch.float64 else x.float()


class Output(NamedTuple):
    logits: Tensor  # [b, t, vocab], or the last rows only
    past_key_values: list[tuple[Tensor, Tensor]] | None  # a layer's K and V: [b, n, s, d]


class Reference:
    """Gemma 1, 2 or 3 over a dict of tensors under their checkpoint's names.

    config  :: any GemmaConfig
    weights :: those of config.tensor_shapes(), all of one dtype and on one device
    """

    def __init__(self, config: GemmaConfig, weights: dict[str, Tensor]) -> None:
        self.config = config
        self.weights = weights

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Reference:
        """Reads the same checkpoints as the model, with the same errors."""
        return cls.from_checkpoint(open_checkpoint(name_or_path), dtype=dtype, device=device)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device | str
    ) -> Reference:
        """From an open checkpoint."""
        weights = {}
        for name, shape in checkpoint.shapes.items():
            weights[name] = torch.empty(shape, dtype=dtype, device=device)
            checkpoint.copy(name, weights[name])
        return cls(checkpoint.config, weights)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: list[tuple[Tensor, Tensor]] | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
    ) -> Output:
        """input_ids :: [b, t]; attention_mask :: [b, s], 0 for padding. logits_to_keep=0: all."""
        past = past_key_values[0][0].shape[2] if past_key_values else 0
        t = input_ids.shape[1]
        s = past + t
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids[:, :1]).expand(-1, s)
        if position_ids is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, past:]  # [b, t]
        source = torch.arange(s, device=input_ids.device)[None, :]
        target = source[:, past:].mT  # [t, 1]
        seen = (source <= target) & attention_mask.bool()[:, None, :]  # [b, t, s]

        config = self.config
        hiddens = embed(input_ids, self.weights["model.embed_tokens.weight"])
        cache = []
        for i, kind in enumerate(config.layer_types):
            visible = seen
            if (window := config.window(i)) is not None:
                visible = seen & (source > target - window)
            turns = angles(config, position_ids, kind)
            past_of_layer = past_key_values[i] if past_key_values else None
            hiddens, key_values = self.layer(i, hiddens, visible, turns, past_of_layer)
            cache.append(key_values)

        hiddens = self.norm(hiddens[:, -logits_to_keep:], "model.norm")
        return Output(self.predict(hiddens), cache if use_cache else None)

    __call__ = forward

    def layer(
        self,
        i: int,
        hiddens: Tensor,
        visible: Tensor,
        turns: tuple[Tensor, Tensor],
        past: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """hiddens :: [b, t, hidden] → after layer i; and its K and V, past ones included."""
        name = f"model.layers.{i}"
        x = self.norm(hiddens, f"{name}.input_layernorm")
        x, key_values = self.attention(f"{name}.self_attn", x, visible, turns, past)
        # Gemma 1 calls the norm before its MLP post_attention_layernorm.
        before_mlp = "post_attention_layernorm"
        if self.config.post_norms:
            x = self.norm(x, f"{name}.post_attention_layernorm")
            before_mlp = "pre_feedforward_layernorm"
        hiddens = hiddens + x

        x = self.norm(hiddens, f"{name}.{before_mlp}")
        x = self.mlp(f"{name}.mlp", x)
        if self.config.post_norms:
            x = self.norm(x, f"{name}.post_feedforward_layernorm")
        return hiddens + x, key_values

    def attention(
        self,
        name: str,
        x: Tensor,
        visible: Tensor,
        turns: tuple[Tensor, Tensor],
        past: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        config, (b, t, _), d = self.config, x.shape, self.config.head_dim
        q, k, v = (self.project(x, f"{name}.{p}_proj") for p in "qkv")
        q, k, v = (y.view(b, t, -1, d).transpose(1, 2) for y in (q, k, v))  # [b, heads, t, d]
        if config.qk_norm:
            q, k = self.norm(q, f"{name}.q_norm"), self.norm(k, f"{name}.k_norm")
        q, k = rotate(q, *turns), rotate(k, *turns)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)  # [b, n, s, d]
        scale = config.query_pre_attn_scalar**-0.5
        out = attend(q, k, v, visible, scale, config.attn_logit_softcapping)
        out = out.transpose(1, 2).reshape(b, t, -1)  # [b, t, n * m * d]
        return self.project(out, f"{name}.o_proj"), (k, v)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        gate, up = (self.project(x, f"{name}.{p}_proj") for p in ("gate", "up"))
        return self.project(geglu(gate, up), f"{name}.down_proj")

    def predict(self, hiddens: Tensor) -> Tensor:
        """Logits: the product with the embedding, which serves both ends, and its soft cap."""
        logits = self.project(hiddens, "model.embed_tokens")
        return cap(logits, self.config.final_logit_softcapping)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self.weights[f"{name}.weight"], self.config.rms_norm_eps)

    def project(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"])
