"""One layer of Gemma on the kernels: its weights, and its two branches off the residual stream.

norm, qkv product · attention · output product · norm, gate+up product, GeGLU · down product: of one
new token each is one kernel.

    b batch · t new tokens · n kv heads · m query heads per kv head · d head dim

Projections that read the same input are one product: `qkv_proj`, `gate_up_proj`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from gemma_fast.config import GemmaConfig
from gemma_fast.kernels.attention import attention
from gemma_fast.kernels.decode_attention import decode_attention
from gemma_fast.kernels.matvec import linear, norm_linear
from gemma_fast.kernels.rotary import rotary_write
from gemma_fast.model.cache import KVCache
from gemma_fast.model.rope import Tables

# A layer's weights, and the checkpoint's tensors that each is made of, stacked.
LAYER_WEIGHTS = {
    "input_layernorm": ["input_layernorm"],
    "qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "q_norm": ["self_attn.q_norm"],
    "k_norm": ["self_attn.k_norm"],
    "o_proj": ["self_attn.o_proj"],
    "post_attention_layernorm": ["post_attention_layernorm"],
    "pre_feedforward_layernorm": ["pre_feedforward_layernorm"],
    "gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
    "down_proj": ["mlp.down_proj"],
    "post_feedforward_layernorm": ["post_feedforward_layernorm"],
}
# Gemma 1 has only two norms a layer; the second, before its MLP, has a name that says otherwise.
GEMMA1_WEIGHTS = {
    "post_attention_layernorm": [],
    "pre_feedforward_layernorm": ["post_attention_layernorm"],
}


class Residual(NamedTuple):
    """The residual stream, whose newest term the next norm adds.

    x          [b, t, hidden], of the layer before, not yet added to `residual`
    residual   [b, t, hidden]; None: x, the embedding, is the stream
    post_norm  [hidden], weight of the norm that is applied to x before it is added; None: none
    """

    x: Tensor
    residual: Tensor | None = None
    post_norm: Tensor | None = None

    def last(self, tokens: int) -> Residual:
        """The stream of the last tokens only; 0: of all."""
        assert self.residual is not None
        return Residual(self.x[:, -tokens:], self.residual[:, -tokens:], self.post_norm)


class Layer(nn.Module):
    """Weights under their checkpoint's names, fused."""

    input_layernorm: Tensor
    qkv_proj: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    o_proj: Tensor
    post_attention_layernorm: Tensor | None
    pre_feedforward_layernorm: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor
    post_feedforward_layernorm: Tensor | None

    def __init__(self, config: GemmaConfig, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        shapes = config.tensor_shapes()
        self.parts: dict[str, list[str]] = {}
        for name, parts in (LAYER_WEIGHTS | ({} if config.post_norms else GEMMA1_WEIGHTS)).items():
            tensors = [f"model.layers.{index}.{part}.weight" for part in parts]
            self.parts[name] = [tensor for tensor in tensors if tensor in shapes]
            weight = None
            if self.parts[name]:
                rows = sum(shapes[tensor][0] for tensor in self.parts[name])
                weight = frozen(rows, *shapes[self.parts[name][0]][1:])
            self.register_parameter(name, weight)

    def forward(self, stream: Residual, angles: Tables, cache: KVCache) -> Residual:
        """The stream before this layer → after it. angles: the tokens', from `cache.angles_of`.
        Their K and V join the cache."""
        eps = self.config.rms_norm_eps
        qkv, residual = norm_linear(
            stream.x, stream.residual, self.input_layernorm, stream.post_norm, self.qkv_proj,
            eps=eps, prefetch=True,
        )  # fmt: skip
        x = linear(self.attend(qkv, angles, cache), self.o_proj, prefetch=True)
        x, residual = norm_linear(
            x, residual, self.pre_feedforward_layernorm, self.post_attention_layernorm,
            self.gate_up_proj, geglu=True, eps=eps, prefetch=True,
        )  # fmt: skip
        x = linear(x, self.down_proj, prefetch=True)
        return Residual(x, residual, self.post_feedforward_layernorm)

    def attend(self, qkv: Tensor, angles: Tables, cache: KVCache) -> Tensor:
        """qkv :: [b, t, (n * m + 2 * n) * d] → [b, t, n * m * d]"""
        config, (b, t, _), d = self.config, qkv.shape, self.config.head_dim
        n, heads = config.num_key_value_heads, config.num_attention_heads
        options = {
            "scale": config.query_pre_attn_scalar**-0.5, "window": config.window(self.index),
            "softcap": config.attn_logit_softcapping, "eps": config.rms_norm_eps,
        }  # fmt: skip
        query_offset = cache.next_position
        cos, sin = angles[config.layer_types[self.index]]
        if t == 1:
            out = decode_attention(
                qkv.view(b, heads + 2 * n, d), cache.keys[self.index], cache.values[self.index],
                cos, sin, query_offset, cache.counter, self.q_norm, self.k_norm, prefetch=True,
                **options,
            )  # fmt: skip
            return out.view(b, 1, heads * d)
        q, k, v = qkv.view(b, t, heads + 2 * n, d).split((heads, n, n), dim=2)
        keys, values = cache.rings(self.index, t)
        rotary_write(k, v, keys, values, cos, sin, query_offset, self.k_norm, config.rms_norm_eps)
        out = attention(q, keys, values, cos, sin, query_offset, self.q_norm, **options)
        cache.keep(self.index, keys, values, t)
        return out.view(b, t, heads * d)


def frozen(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape), requires_grad=False)
