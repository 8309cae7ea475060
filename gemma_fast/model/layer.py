"""One layer of Gemma on the kernels: its weights, attention and MLP.

A layer has five steps. In a decode step of a few sequences, each of these steps is one kernel:

    norm, QKV projection → attention → output projection → norm, gate and up projection, GeGLU
    → down projection

    b batch · t new tokens · n kv heads · m query heads per kv head · d head dim

Projections that read the same input are fused into one matmul: `qkv_proj`, `gate_up_proj`.
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

# Weight of a layer → the checkpoint's tensors that are stacked in it.
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
# Gemma 1 has only two norms per layer. In its checkpoints, post_attention_layernorm is the name of
# the norm before the MLP.
GEMMA1_WEIGHTS = {
    "post_attention_layernorm": [],
    "pre_feedforward_layernorm": ["post_attention_layernorm"],
}


class Residual(NamedTuple):
    """The residual stream, stored as two terms, which the op of the next norm adds.

    x          [b, t, hidden], the previous layer's output, not yet added to `residual`
    residual   [b, t, hidden]; None: x is the embedding, and there is nothing to add
    post_norm  [hidden], weight of the norm that is applied to x before x is added; None: no norm
    """

    x: Tensor
    residual: Tensor | None = None
    post_norm: Tensor | None = None

    def last(self, tokens: int) -> Residual:
        """Returns the stream of only the last `tokens` tokens, or of all tokens if it is 0."""
        assert self.residual is not None
        return Residual(self.x[:, -tokens:], self.residual[:, -tokens:], self.post_norm)


class Layer(nn.Module):
    """One layer of Gemma. Its weights have the checkpoint's names, except the fused projections."""

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
        """Returns the residual stream after this layer. Writes the tokens' K and V to the cache.

        angles: layer type → cos and sin of the tokens' rotary angles, from `cache.angles_of`.
        """
        eps = self.config.rms_norm_eps
        qkv, residual = norm_linear(
            stream.x, stream.residual, self.input_layernorm, stream.post_norm, self.qkv_proj,
            eps=eps, pdl=True,
        )  # fmt: skip
        x = linear(self.attend(qkv, angles, cache), self.o_proj, pdl=True)
        x, residual = norm_linear(
            x, residual, self.pre_feedforward_layernorm, self.post_attention_layernorm,
            self.gate_up_proj, geglu=True, eps=eps, pdl=True,
        )  # fmt: skip
        x = linear(x, self.down_proj, pdl=True)
        return Residual(x, residual, self.post_feedforward_layernorm)

    def attend(self, qkv: Tensor, angles: Tables, cache: KVCache) -> Tensor:
        """Writes the K and V in qkv :: [b, t, (n * m + 2 * n) * d] to the cache, and returns
        attention's output :: [b, t, n * m * d]."""
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
                cos, sin, query_offset, cache.counter, self.q_norm, self.k_norm, pdl=True,
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
