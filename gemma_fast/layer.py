"""One layer of Gemma on the kernels: its weights, and its two branches off the residual stream.

    b batch · t new tokens · n kv heads · m query heads per kv head · d head dim

Projections that read the same input are one product: `qkv_proj`, `gate_up_proj`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma_fast.cache import KVCache
from gemma_fast.config import GemmaConfig
from gemma_fast.kernels.attention import attention
from gemma_fast.kernels.geglu import geglu
from gemma_fast.kernels.rotary import rotary_write

HAS_ONEDNN = torch.backends.mkldnn.is_available()

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


class Layer(nn.Module):
    """Weights under their checkpoint's names, fused; `attend` and `mlp` are called by the model."""

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

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor, start: Tensor, cache: KVCache) -> Tensor:
        """x :: [b, t, hidden], normalised → the branch's result; K and V join the cache."""
        config, (b, t, _), d = self.config, x.shape, self.config.head_dim
        n, heads = config.num_key_value_heads, config.num_attention_heads
        qkv = linear(x, self.qkv_proj).view(b, t, heads + 2 * n, d)
        q, k, v = qkv.split((heads, n, n), dim=2)  # [b, t, n * m | n | n, d]
        keys, values = cache.rings(self.index, t)
        rotary_write(k, v, keys, values, cos, sin, start, self.k_norm, config.rms_norm_eps)
        out = attention(
            q, keys, values, cos, sin, start, self.q_norm,
            scale=config.query_pre_attn_scalar**-0.5, window=config.window(self.index),
            softcap=config.attn_logit_softcapping, eps=config.rms_norm_eps,
        )  # fmt: skip
        cache.keep(self.index, keys, values, t)
        return linear(out.view(b, t, heads * d), self.o_proj)

    def mlp(self, x: Tensor) -> Tensor:
        """x :: [b, t, hidden], normalised → the branch's result."""
        return linear(geglu(linear(x, self.gate_up_proj)), self.down_proj)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weightᵀ: [..., in], [out, in] → [..., out].

    On the CPU in float32 it is oneDNN's product, as Inductor calls it: F.linear takes MKL's, which
    reads weights 2.6 times slower on an AMD processor (benchmarks/LOG.md). Inductor itself cannot
    compile that call.
    """
    eager = HAS_ONEDNN and not torch.compiler.is_compiling()
    if eager and x.is_cpu and x.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def frozen(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape), requires_grad=False)
