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

        hiddens = self.embed(input_ids)
        cache = []
        for i, kind in enumerate(self.config.layer_types):
            visible = seen
            if (window := self.config.window(i)) is not None:
                visible = seen & (source > target - window)
            cos, sin = self.angles(position_ids, kind)
            key_values = past_key_values[i] if past_key_values else None
            hiddens, key_values = self.layer(i, hiddens, visible, cos, sin, key_values)
            cache.append(key_values)

        hiddens = self.rms_norm(hiddens[:, -logits_to_keep:], "model.norm.weight")
        return Output(self.predict(hiddens), cache if use_cache else None)

    __call__ = forward

    def embed(self, input_ids: Tensor) -> Tensor:
        """Rows of the embedding, times sqrt(hidden) rounded to the weights' dtype."""
        embeddings = self.weights["model.embed_tokens.weight"]
        scale = torch.tensor(self.config.hidden_size**0.5).to(embeddings.dtype)
        return embeddings[input_ids] * scale.to(embeddings.device)  # [b, t, hidden]

    def layer(
        self,
        i: int,
        hiddens: Tensor,
        visible: Tensor,
        cos: Tensor,
        sin: Tensor,
        past: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        name = f"model.layers.{i}."
        x = self.rms_norm(hiddens, f"{name}input_layernorm.weight")
        x, key_values = self.attention(f"{name}self_attn.", x, visible, cos, sin, past)
        # Gemma 1 calls the norm before its MLP post_attention_layernorm.
        before_mlp = "post_attention_layernorm"
        if self.config.post_norms:
            x = self.rms_norm(x, f"{name}post_attention_layernorm.weight")
            before_mlp = "pre_feedforward_layernorm"
        hiddens = hiddens + x

        x = self.rms_norm(hiddens, f"{name}{before_mlp}.weight")
        x = self.mlp(f"{name}mlp.", x)
        if self.config.post_norms:
            x = self.rms_norm(x, f"{name}post_feedforward_layernorm.weight")
        return hiddens + x, key_values

    def rms_norm(self, x: Tensor, name: str) -> Tensor:
        """x / rms(x) * (1 + weight), all in fp32, rounded once."""
        z = x.float()
        z = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return (z * (1 + self.weights[name].float())).to(x.dtype)

    def angles(self, positions: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        """cos and sin :: [b, 1, t, d / 2] of position * theta^(-2i / d), in fp32."""
        config, full = self.config, kind == FULL
        theta = config.rope_theta if full else config.rope_local_base_freq
        i = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device)
        inv_freq = 1 / theta ** (i / config.head_dim)
        if full:
            inv_freq = inv_freq / config.rope_scaling_factor
        angles = positions[:, None, :, None].float() * inv_freq
        return angles.cos(), angles.sin()

    def attention(
        self,
        name: str,
        x: Tensor,
        visible: Tensor,
        cos: Tensor,
        sin: Tensor,
        past: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        config, (b, t, _), d = self.config, x.shape, self.config.head_dim
        q, k, v = (F.linear(x, self.weights[f"{name}{p}_proj.weight"]) for p in "qkv")
        q, k, v = (y.view(b, t, -1, d).transpose(1, 2) for y in (q, k, v))  # [b, heads, t, d]
        if config.qk_norm:
            q = self.rms_norm(q, f"{name}q_norm.weight")
            k = self.rms_norm(k, f"{name}k_norm.weight")
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)  # [b, n, s, d]

        m = config.num_attention_heads // config.num_key_value_heads
        keys, values = (y.repeat_interleave(m, dim=1) for y in (k, v))  # [b, n * m, s, d]
        scores = q @ keys.transpose(2, 3) * config.query_pre_attn_scalar**-0.5  # [b, n * m, t, s]
        scores = self.cap(scores, config.attn_logit_softcapping)
        scores = scores.masked_fill(~visible[:, None], torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        out = (weights @ values).transpose(1, 2).reshape(b, t, -1)  # [b, t, n * m * d]
        return F.linear(out, self.weights[f"{name}o_proj.weight"]), (k, v)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates channels i and i + d / 2 as a pair."""
        x1, x2 = x.float().chunk(2, dim=-1)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        gate, up, down = (self.weights[f"{name}{p}_proj.weight"] for p in ("gate", "up", "down"))
        return F.linear(F.gelu(F.linear(x, gate), approximate="tanh") * F.linear(x, up), down)

    def predict(self, hiddens: Tensor) -> Tensor:
        """Logits: the projection with the embedding's weights, then the soft cap."""
        logits = F.linear(hiddens, self.weights["model.embed_tokens.weight"])
        return self.cap(logits, self.config.final_logit_softcapping)

    def cap(self, x: Tensor, softcap: float | None) -> Tensor:
        return x if softcap is None else softcap * torch.tanh(x / softcap)
