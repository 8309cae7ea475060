"""Gemma in plain PyTorch, from token ids to next-token logits, with one function for each step.

Tests compare the model with this file, and the model benchmarks run it as "eager". This file shares
no code with the model or the kernels.

    b batch · t new tokens · s past and new tokens · n kv heads · m query heads per kv head
    d head dim · heads: n * m for queries, n for keys and values

The steps follow Graphcore Research's "A transformer walk-through, with Gemma". The numerics follow
Google's gemma_pytorch and transformers: RMSNorm, rotary embedding and softmax are computed in fp32,
all other steps in the weights' dtype.
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_fast.checkpoint.base import Checkpoint
from gemma_fast.checkpoint.open import open_checkpoint
from gemma_fast.config import GemmaConfig, RopeParameters

T = TypeVar("T")


def embed(input_ids: Tensor, embeddings: Tensor) -> Tensor:
    """Returns embeddings[input_ids] * sqrt(hidden) :: [b, t, hidden].

    input_ids :: [b, t]; embeddings :: [vocab, hidden]. sqrt(hidden) is rounded to the dtype of
    embeddings before the multiplication.
    """
    scale = torch.tensor(embeddings.shape[1] ** 0.5).to(embeddings.dtype)
    return embeddings[input_ids] * scale.to(embeddings.device)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns x / rms(x) * (1 + weight), computed in fp32 and rounded to x's dtype at the end."""
    z = wide(x)
    z = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + eps)
    return (z * (1 + wide(weight))).to(x.dtype)


def angles(rope: RopeParameters, d: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cos and sin :: [b, 1, t, d / 2] of the rotary angles position * theta^(-2i / d).

    positions :: [b, t]; rope: the layer's rotary parameters. The angles are computed in fp32.
    Linear scaling divides all angles by rope.factor. YaRN divides those of slow channel pairs only,
    and multiplies cos and sin by rope.attention_factor.
    """
    i = torch.arange(d // 2, dtype=torch.float32, device=positions.device)
    inv_freq = 1 / rope.rope_theta ** (2 * i / d)
    if rope.rope_type == "linear":
        inv_freq = inv_freq / rope.factor
    if rope.rope_type == "yarn":
        inv_freq = inv_freq * (1 - yarn_ramp(rope, i, d) * (1 - 1 / rope.factor))
    angles = positions[:, None, :, None].float() * inv_freq
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor


def yarn_ramp(rope: RopeParameters, i: Tensor, d: int) -> Tensor:
    """Returns 0 for channel pairs that YaRN leaves unchanged, 1 for those whose angles it divides,
    and values between 0 and 1 for the pairs between them :: [d / 2]. i :: [d / 2]: 0, 1, 2, …"""
    context = rope.original_max_position_embeddings
    rotations = torch.tensor([rope.beta_fast, rope.beta_slow], dtype=torch.float64)
    low, high = (
        d * torch.log(context / (2 * math.pi * rotations)) / (2 * math.log(rope.rope_theta))
    ).tolist()
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    return ((i - low) / max(high - low, 0.001)).clamp(0, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each channel pair (i, i + d / 2) of x :: [b, heads, t, d] by its angle, in fp32."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def attention_scores(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Returns scale * q @ keysᵀ :: [b, n * m, t, s].

    q :: [b, n * m, t, d]; keys :: [b, n, s, d]
    """
    m = q.shape[1] // keys.shape[1]
    return q @ keys.repeat_interleave(m, dim=1).transpose(2, 3) * scale


def attention_weights(scores: Tensor, visible: Tensor, softcap: float | None) -> Tensor:
    """Returns softmax(cap(scores)) over the visible keys :: [b, n * m, t, s], computed in fp32.

    scores :: [b, n * m, t, s]
    visible :: [b or 1, t, s], bool: whether a new token sees a key
    """
    scores = cap(scores, softcap)
    # A padding token sees no key. If its scores were all -inf, its softmax would be NaN.
    scores = scores.masked_fill(~visible[:, None], torch.finfo(scores.dtype).min)
    return wide(scores).softmax(-1).to(scores.dtype)


def attend(weights: Tensor, values: Tensor) -> Tensor:
    """Returns weights @ values :: [b, n * m, t, d]: for each query, the weighted sum of the values.

    weights :: [b, n * m, t, s]; values :: [b, n, s, d]
    """
    m = weights.shape[1] // values.shape[1]
    return weights @ values.repeat_interleave(m, dim=1)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Returns gelu(gate) * up, with the tanh approximation of GELU."""
    return F.gelu(gate, approximate="tanh") * up


def cap(x: Tensor, softcap: float | None) -> Tensor:
    """Limits x smoothly to the range from -softcap to softcap. Returns x if softcap is None."""
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def wide(x: Tensor) -> Tensor:
    """Returns x in fp32, or unchanged if it is fp64."""
    return x if x.dtype == torch.float64 else x.float()


class Output(NamedTuple):
    logits: Tensor  # [b, t, vocab], or [b, logits_to_keep, vocab]
    past_key_values: list[tuple[Tensor, Tensor]] | None  # K and V of each layer: [b, n, s, d]


class Reference:
    """Gemma 1, 2 or 3 (text), computed with a dict of weights under the checkpoint's tensor names.

    config   any GemmaConfig
    weights  all tensors of config.tensor_shapes(), in one dtype and on one device
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
        """Loads a directory of safetensors, a .gguf file or a hub id, like GemmaForCausalLM."""
        return cls.from_checkpoint(open_checkpoint(name_or_path), dtype=dtype, device=device)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device | str
    ) -> Reference:
        """Creates a reference with the checkpoint's weights, converted to dtype."""
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
        """Returns the KV cache and, for each token of input_ids, the logits of the token after it.

        input_ids        [b, t]
        attention_mask   [b, s], 0 for padding; None: no padding
        position_ids     [b, t]; None: counted from attention_mask
        past_key_values  the KV cache that an earlier call returned; it is not changed
        logits_to_keep   number of last tokens whose logits are returned; 0: all tokens
        """
        past = past_key_values[0][0].shape[2] if past_key_values else 0
        t = input_ids.shape[1]
        s = past + t
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids[:, :1]).expand(-1, s)
        if position_ids is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, past:]  # [b, t]
        source = torch.arange(s, device=input_ids.device)[None, :]
        target = source[:, past:].mT  # [t, 1]
        seen = (source <= target) & attention_mask.bool()[:, None, :]
        seen = self.observe("mask", seen)  # [b, t, s]

        config = self.config
        embeddings = self.weights["model.embed_tokens.weight"]
        hiddens = self.observe("embed", embed(input_ids, embeddings))
        cache = []
        for i, kind in enumerate(config.layer_types):
            visible = seen
            if (window := config.window(i)) is not None:
                visible = seen & (source > target - window)
            cos_sin = angles(config.rope(kind), config.head_dim, position_ids)
            cos_sin = self.observe(f"model.layers.{i}.angles", cos_sin)
            past_of_layer = past_key_values[i] if past_key_values else None
            hiddens, key_values = self.layer(i, hiddens, visible, cos_sin, past_of_layer)
            cache.append(key_values)

        hiddens = self.norm(hiddens[:, -logits_to_keep:], "model.norm")
        return Output(self.predict(hiddens), cache if use_cache else None)

    __call__ = forward

    def layer(
        self,
        i: int,
        hiddens: Tensor,
        visible: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        past: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Returns hiddens :: [b, t, hidden] after layer i, and this layer's K and V of all tokens.

        visible  [b, t, s], bool: whether a new token sees a key
        cos_sin  cos and sin of the new tokens' rotary angles, from `angles`
        past     this layer's K and V of the past tokens, or None
        """
        name = f"model.layers.{i}"
        x = self.norm(hiddens, f"{name}.input_layernorm")
        x, key_values = self.attention(f"{name}.self_attn", x, visible, cos_sin, past)
        # In Gemma 1, post_attention_layernorm is the name of the norm before the MLP.
        before_mlp = "post_attention_layernorm"
        if self.config.post_norms:
            x = self.norm(x, f"{name}.post_attention_layernorm")
            before_mlp = "pre_feedforward_layernorm"
        x = self.observe(f"{name}.attention", x)
        hiddens = self.observe(f"{name}.after_attention", hiddens + x)

        x = self.norm(hiddens, f"{name}.{before_mlp}")
        x = self.mlp(f"{name}.mlp", x)
        if self.config.post_norms:
            x = self.norm(x, f"{name}.post_feedforward_layernorm")
        x = self.observe(f"{name}.mlp", x)
        return self.observe(f"{name}.after_mlp", hiddens + x), key_values

    def attention(
        self,
        name: str,
        x: Tensor,
        visible: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        past: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Returns attention's output :: [b, t, hidden], and K and V of the past and new tokens.

        name: prefix of the weights' names; x: normalized hiddens :: [b, t, hidden].
        """
        config, (b, t, _), d = self.config, x.shape, self.config.head_dim
        q, k, v = (self.project(x, f"{name}.{p}_proj") for p in "qkv")
        q, k, v = (y.view(b, t, -1, d).transpose(1, 2) for y in (q, k, v))  # [b, heads, t, d]
        if config.qk_norm:
            q, k = self.norm(q, f"{name}.q_norm"), self.norm(k, f"{name}.k_norm")
        q = self.observe(f"{name}.queries", rotate(q, *cos_sin))
        k = self.observe(f"{name}.keys", rotate(k, *cos_sin))
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)  # [b, n, s, d]
        scale = config.query_pre_attn_scalar**-0.5
        scores = self.observe(f"{name}.scores", attention_scores(q, k, scale))
        weights = attention_weights(scores, visible, config.attn_logit_softcapping)
        weights = self.observe(f"{name}.weights", weights)
        out = self.observe(f"{name}.attend", attend(weights, v))
        out = out.transpose(1, 2).reshape(b, t, -1)  # [b, t, n * m * d]
        return self.project(out, f"{name}.o_proj"), (k, v)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        """Returns the MLP's output :: [b, t, hidden]. x: normalized hiddens :: [b, t, hidden]."""
        gate, up = (self.project(x, f"{name}.{p}_proj") for p in ("gate", "up"))
        x = self.observe(f"{name}.geglu", geglu(gate, up))
        return self.project(x, f"{name}.down_proj")

    def predict(self, hiddens: Tensor) -> Tensor:
        """Returns logits :: [b, t, vocab]. The weight of the output projection is the embedding's,
        unless the checkpoint has another one."""
        tied = self.config.tie_word_embeddings
        logits = self.project(hiddens, "model.embed_tokens" if tied else "lm_head")
        return self.observe("logits", cap(logits, self.config.final_logit_softcapping))

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return self.observe(name, rms_norm(x, weight, self.config.rms_norm_eps))

    def project(self, x: Tensor, name: str) -> Tensor:
        return self.observe(name, F.linear(x, self.weights[f"{name}.weight"]))

    def observe(self, name: str, x: T) -> T:
        """Returns x, the result of a step. A subclass may record x or return another tensor.

        name: the name of the step's weight without ".weight", or for example
        "model.layers.0.self_attn.scores"
        """
        return x
