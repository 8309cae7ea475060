"""Gemma 1 to 4 in plain PyTorch, from token ids to the logits of the next token.

This file has the order of the steps, reference_steps.py their formulas. Neither shares code with
the model or the kernels. Tests compare the model with them, and benchmarks run them as "eager".

    b batch · t new tokens · s past and new tokens · n kv heads · m query heads per kv head
    d head dim · heads: n * m for queries, n for keys and values
"""

from __future__ import annotations

import os
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from gemma_fast.checkpoint.base import Checkpoint
from gemma_fast.checkpoint.open import open_checkpoint
from gemma_fast.config import GemmaConfig
from gemma_fast.reference_steps import (
    angles,
    attend,
    attention_scores,
    attention_weights,
    cap,
    choose_experts,
    embed,
    geglu,
    per_layer_inputs,
    rms_norm,
    rotate,
    visible_keys,
)

Angles = tuple[Tensor, Tensor]  # cos and sin :: [b, 1, t, d / 2]
KeyValues = tuple[Tensor, Tensor]  # K and V of one layer :: [b, n, s, d]
T = TypeVar("T")


class Output(NamedTuple):
    logits: Tensor  # [b, t, vocab], or [b, logits_to_keep, vocab]
    past_key_values: list[KeyValues] | None  # of each layer


class Reference:
    """Gemma 1 to 4 (text). weights: the tensors of config.tensor_shapes() by name, in one dtype and
    on one device."""

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
        past_key_values: list[KeyValues] | None = None,
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
        config, t = self.config, input_ids.shape[1]
        past = past_key_values[0][0].shape[2] if past_key_values else 0
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids[:, :1]).expand(-1, past + t)
        if position_ids is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, past:]  # [b, t]

        embeddings = self.weights["model.embed_tokens.weight"]
        hiddens = self.observe("embed", embed(input_ids, embeddings))
        per_layer = self.per_layer_inputs(input_ids, hiddens)
        cache: list[KeyValues] = []
        for i, layer in enumerate(config.layers):
            visible = visible_keys(attention_mask, t, layer.window)
            visible = self.observe(f"model.layers.{i}.mask", visible)
            cos_sin = angles(config.rope(layer.kind), layer.head_dim, position_ids)
            cos_sin = self.observe(f"model.layers.{i}.angles", cos_sin)
            past_kv = past_key_values[i] if past_key_values else None
            shared = cache[layer.kv_layer] if layer.kv_layer < i else None
            hiddens, kv = self.layer(i, hiddens, visible, cos_sin, past_kv, shared, per_layer)
            cache.append(kv)

        hiddens = self.norm(hiddens[:, -logits_to_keep:], "model.norm")
        return Output(self.predict(hiddens), cache if use_cache else None)

    __call__ = forward

    def layer(
        self,
        i: int,
        hiddens: Tensor,
        visible: Tensor,
        cos_sin: Angles,
        past: KeyValues | None = None,
        shared: KeyValues | None = None,
        per_layer: Tensor | None = None,
    ) -> tuple[Tensor, KeyValues]:
        """Returns hiddens :: [b, t, hidden] after layer i, and K and V of all tokens.

        visible    [b, t, s], bool: whether a new token sees a key
        cos_sin    cos and sin of the new tokens' rotary angles, from `angles`
        past       this layer's K and V of the past tokens, or None
        shared     the earlier layer's K and V that this layer reads (Gemma 4), or None: its own
        per_layer  [b, t, layers, p], from `per_layer_inputs` (Gemma 4), or None
        """
        name = f"model.layers.{i}"
        x = self.norm(hiddens, f"{name}.input_layernorm")
        x, key_values = self.attention(i, x, visible, cos_sin, past, shared)
        # In Gemma 1, post_attention_layernorm is the name of the norm before the MLP.
        before_mlp = "post_attention_layernorm"
        if self.config.post_norms:
            x = self.norm(x, f"{name}.post_attention_layernorm")
            before_mlp = "pre_feedforward_layernorm"
        x = self.observe(f"{name}.attention", x)
        hiddens = self.observe(f"{name}.after_attention", hiddens + x)

        x = self.norm(hiddens, f"{name}.{before_mlp}")
        x = self.mlp(f"{name}.mlp", x)
        if self.config.num_experts:
            x = self.norm(x, f"{name}.post_feedforward_layernorm_1")
            x = x + self.experts(name, hiddens)
        if self.config.post_norms:
            x = self.norm(x, f"{name}.post_feedforward_layernorm")
        x = self.observe(f"{name}.mlp", x)
        hiddens = self.observe(f"{name}.after_mlp", hiddens + x)

        if per_layer is not None:
            hiddens = self.add_per_layer(name, hiddens, per_layer[:, :, i])
        if (scalar := self.weights.get(f"{name}.layer_scalar")) is not None:
            hiddens = self.observe(f"{name}.layer_scalar", hiddens * scalar)
        return hiddens, key_values

    def attention(
        self,
        i: int,
        x: Tensor,
        visible: Tensor,
        cos_sin: Angles,
        past: KeyValues | None = None,
        shared: KeyValues | None = None,
    ) -> tuple[Tensor, KeyValues]:
        """Returns attention's output :: [b, t, hidden], and K and V of the past and new tokens.
        x: normalized hiddens :: [b, t, hidden]; the others as in `layer`."""
        config, name = self.config, f"model.layers.{i}.self_attn"
        q = self.heads(i, x, f"{name}.q_proj")
        if config.qk_norm:
            q = self.norm(q, f"{name}.q_norm")
        q = self.observe(f"{name}.queries", rotate(q, *cos_sin))
        k, v = self.key_values(i, x, cos_sin, past) if shared is None else shared
        scale = config.query_pre_attn_scalar**-0.5
        scores = self.observe(f"{name}.scores", attention_scores(q, k, scale))
        weights = attention_weights(scores, visible, config.attn_logit_softcapping)
        weights = self.observe(f"{name}.weights", weights)
        out = self.observe(f"{name}.attend", attend(weights, v))
        out = out.transpose(1, 2).flatten(2)  # [b, t, n * m * d]
        return self.project(out, f"{name}.o_proj"), (k, v)

    def key_values(self, i: int, x: Tensor, cos_sin: Angles, past: KeyValues | None) -> KeyValues:
        """Returns K and V of the past and new tokens. x: normalized hiddens :: [b, t, hidden]."""
        config, name = self.config, f"model.layers.{i}.self_attn"
        k = self.heads(i, x, f"{name}.k_proj")
        v = k if config.layers[i].k_eq_v else self.heads(i, x, f"{name}.v_proj")
        if config.qk_norm:
            k = self.norm(k, f"{name}.k_norm")
        if config.v_norm:
            v = self.norm(v, f"{name}.v_norm")
        k = self.observe(f"{name}.keys", rotate(k, *cos_sin))
        if past is None:
            return k, v
        return torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)  # [b, n, s, d]

    def heads(self, i: int, x: Tensor, name: str) -> Tensor:
        """Returns the projection of x :: [b, t, hidden], split into heads :: [b, heads, t, d]."""
        d = self.config.layers[i].head_dim
        return self.project(x, name).unflatten(-1, (-1, d)).transpose(1, 2)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        """Returns the MLP's output :: [b, t, hidden]. x: normalized hiddens :: [b, t, hidden]."""
        gate, up = (self.project(x, f"{name}.{p}_proj") for p in ("gate", "up"))
        x = self.observe(f"{name}.geglu", geglu(gate, up))
        return self.project(x, f"{name}.down_proj")

    def experts(self, name: str, hiddens: Tensor) -> Tensor:
        """Returns the normalized output of the mixture of experts :: [b, t, hidden], which is added
        to that of the MLP. name: that of the layer."""
        flat = hiddens.flatten(0, 1)  # [b * t, hidden]
        chosen, weights = self.route(f"{name}.router", flat)
        x = self.norm(flat, f"{name}.pre_feedforward_layernorm_2")
        out = torch.zeros_like(x)
        for i in chosen.unique().tolist():
            token, place = torch.where(chosen == i)
            y = self.mlp(f"{name}.experts.{i}", x[token])
            out.index_add_(0, token, (y * weights[token, place, None]).to(out.dtype))
        out = self.observe(f"{name}.experts", out.view_as(hiddens))
        return self.norm(out, f"{name}.post_feedforward_layernorm_2")

    def route(self, name: str, hiddens: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the experts of each token, and their weights :: [b * t, top_k].

        hiddens :: [b * t, hidden]
        """
        x = self.norm(hiddens, f"{name}.norm") * self.weights[f"{name}.scale"]
        scores = self.project(x * hiddens.shape[-1] ** -0.5, f"{name}.proj")
        scale = self.weights[f"{name}.per_expert_scale"]
        chosen, weights = choose_experts(scores, scale, self.config.top_k_experts)
        self.observe(f"{name}.weights", weights)
        return self.observe(f"{name}.chosen", chosen), weights

    def per_layer_inputs(self, input_ids: Tensor, hiddens: Tensor) -> Tensor | None:
        """Returns each layer's input of `add_per_layer` :: [b, t, layers, p], or None if the model
        has no per-layer embeddings. hiddens: the tokens' embeddings :: [b, t, hidden]."""
        p = self.config.hidden_size_per_layer_input
        if not p:
            return None
        embedded = embed(input_ids, self.weights["model.embed_tokens_per_layer.weight"], p)
        projected = self.project(hiddens, "model.per_layer_model_projection")
        projected = (projected * hiddens.shape[-1] ** -0.5).unflatten(-1, (-1, p))
        projected = self.norm(projected, "model.per_layer_projection_norm")
        inputs = per_layer_inputs(embedded.view_as(projected), projected)
        return self.observe("per_layer_inputs", inputs)

    def add_per_layer(self, name: str, hiddens: Tensor, per_layer: Tensor) -> Tensor:
        """Returns hiddens :: [b, t, hidden] plus the update from the layer's per-layer embeddings.
        per_layer: this layer's part of `per_layer_inputs` :: [b, t, p]."""
        gate = self.project(hiddens, f"{name}.per_layer_input_gate")
        x = self.observe(f"{name}.per_layer_geglu", geglu(gate, per_layer))
        x = self.project(x, f"{name}.per_layer_projection")
        x = self.norm(x, f"{name}.post_per_layer_input_norm")
        return self.observe(f"{name}.after_per_layer", hiddens + x)

    def predict(self, hiddens: Tensor) -> Tensor:
        """Returns logits :: [b, t, vocab]. A tied output projection has the embedding's weight."""
        tied = self.config.tie_word_embeddings
        logits = self.project(hiddens, "model.embed_tokens" if tied else "lm_head")
        return self.observe("logits", cap(logits, self.config.final_logit_softcapping))

    def norm(self, x: Tensor, name: str) -> Tensor:
        # Norms of values have no weight.
        weight, config = self.weights.get(f"{name}.weight"), self.config
        return self.observe(name, rms_norm(x, weight, config.rms_norm_eps, config.norm_offset))

    def project(self, x: Tensor, name: str) -> Tensor:
        return self.observe(name, torch.nn.functional.linear(x, self.weights[f"{name}.weight"]))

    def observe(self, name: str, x: T) -> T:
        """Returns x, the result of a step. A subclass may record x or return another tensor.
        name: that of the step's weight, or for example "model.layers.0.self_attn.scores"."""
        return x
