"""One layer of Gemma on the kernels: its weights, attention and MLP.

A layer has five steps, and two more in models with per-layer embeddings. In a decode step of a few
sequences, each of these steps is one kernel:

    norm, QKV projection → attention → output projection → norm, gate and up projection, GeGLU
    → down projection (→ per-layer gate, GeGLU → per-layer projection)

    b batch · t new tokens · n kv heads · m query heads per kv head · d head dim

Projections that read the same input are fused into one matmul: `qkv_proj`, `gate_up_proj`. In
layers that read an earlier layer's keys and values, `qkv_proj` has queries only; where values are
keys (K = V), it has queries and keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gemma_fast.config import NO_SUFFIX, GemmaConfig
from gemma_fast.kernels.attention import attention
from gemma_fast.kernels.decode_attention import decode_attention
from gemma_fast.kernels.experts import experts
from gemma_fast.kernels.matvec import linear, norm_linear
from gemma_fast.kernels.rmsnorm import add_norm
from gemma_fast.kernels.rotary import rotary_write
from gemma_fast.kernels.router import norm_router
from gemma_fast.model.stream import Context, Residual

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
    "per_layer_input_gate": ["per_layer_input_gate"],
    "per_layer_projection": ["per_layer_projection"],
    "post_per_layer_input_norm": ["post_per_layer_input_norm"],
    "layer_scalar": ["layer_scalar"],
    "router_proj": ["router.proj"],
    "router_scale": ["router.scale"],
    "per_expert_scale": ["router.per_expert_scale"],
    "pre_feedforward_layernorm_2": ["pre_feedforward_layernorm_2"],
    "post_feedforward_layernorm_1": ["post_feedforward_layernorm_1"],
    "post_feedforward_layernorm_2": ["post_feedforward_layernorm_2"],
}
# Gemma 1 has only two norms per layer. In its checkpoints, post_attention_layernorm is the name of
# the norm before the MLP.
GEMMA1_WEIGHTS = {
    "post_attention_layernorm": [],
    "pre_feedforward_layernorm": ["post_attention_layernorm"],
}


def layer_weights(config: GemmaConfig) -> dict[str, list[str]]:
    """Returns weight of a layer → the checkpoint's tensors that are stacked in it, if they exist.
    Those of all experts are one matrix: gate and up of expert 0, of expert 1, …"""
    experts = [f"experts.{i}" for i in range(config.num_experts)]
    gate_up = [f"{expert}.{part}_proj" for expert in experts for part in ("gate", "up")]
    return {
        **LAYER_WEIGHTS,
        **({} if config.post_norms else GEMMA1_WEIGHTS),
        "experts_gate_up_proj": gate_up,
        "experts_down_proj": [f"{expert}.down_proj" for expert in experts],
    }


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
    per_layer_input_gate: Tensor | None
    per_layer_projection: Tensor | None
    post_per_layer_input_norm: Tensor | None
    layer_scalar: Tensor | None
    router_proj: Tensor | None
    router_scale: Tensor | None
    per_expert_scale: Tensor | None
    pre_feedforward_layernorm_2: Tensor | None
    post_feedforward_layernorm_1: Tensor | None
    post_feedforward_layernorm_2: Tensor | None
    experts_gate_up_proj: Tensor | None
    experts_down_proj: Tensor | None

    def __init__(self, config: GemmaConfig, index: int) -> None:
        super().__init__()
        self.config, self.index, self.shape = config, index, config.layers[index]
        self.norms: dict[str, Any] = {"eps": config.rms_norm_eps, "offset": config.norm_offset}
        self.kv_is_read = any(x.kv_layer == index for x in config.layers[index + 1 :])
        shapes = config.layer_tensor_shapes(index)
        self.parts: dict[str, list[str]] = {}
        for name, parts in layer_weights(config).items():
            tensors = [part if part in NO_SUFFIX else f"{part}.weight" for part in parts]
            tensors = [tensor for tensor in tensors if tensor in shapes]
            weight = None
            if tensors:
                rows = sum(shapes[tensor][0] for tensor in tensors)
                weight = frozen(rows, *shapes[tensors[0]][1:])
            self.parts[name] = [f"model.layers.{index}.{tensor}" for tensor in tensors]
            self.register_parameter(name, weight)

    def forward(self, stream: Residual, context: Context, keep: int | None = None) -> Residual:
        """Returns the residual stream after this layer. Writes the tokens' K and V to the cache.

        keep  number of last tokens for which the stream is computed; None: all
        """
        t = stream.x.shape[1]
        keep = t if keep is None else keep
        qkv, residual = norm_linear(
            stream.x, stream.residual, self.input_layernorm, stream.post_norm, self.qkv_proj,
            layer_scalar=stream.layer_scalar, pdl=True, **self.norms,
        )  # fmt: skip
        attended = self.attend(qkv, context, keep)
        if not keep:
            return stream
        if keep < t:
            residual, context = residual[:, t - keep :], context.last(keep, t)
        x = linear(attended, self.o_proj, pdl=True)
        x, residual = self.feed_forward(x, residual, context.cache.counter)
        post_norm = self.post_feedforward_layernorm
        if self.per_layer_input_gate is not None:
            assert context.per_layer is not None and self.per_layer_projection is not None
            x, residual = norm_linear(
                x, residual, None, post_norm, self.per_layer_input_gate,
                up=context.per_layer[:, :, self.index], pdl=True, **self.norms,
            )  # fmt: skip
            x = linear(x, self.per_layer_projection, pdl=True)
            post_norm = self.post_per_layer_input_norm
        return Residual(x, residual, post_norm, self.layer_scalar)

    def feed_forward(self, x: Tensor, residual: Tensor, counter: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the output of the MLP, or of the MLP and the experts, and the residual stream
        that it is added to. x: output of the attention, not yet added to `residual`."""
        if self.router_proj is None:
            x, residual = norm_linear(
                x, residual, self.pre_feedforward_layernorm, self.post_attention_layernorm,
                self.gate_up_proj, geglu=True, pdl=True, **self.norms,
            )  # fmt: skip
            return linear(x, self.down_proj, pdl=True), residual
        assert self.post_attention_layernorm is not None
        assert self.pre_feedforward_layernorm_2 is not None
        assert self.router_scale is not None and self.per_expert_scale is not None
        assert self.experts_gate_up_proj is not None and self.experts_down_proj is not None
        assert self.post_feedforward_layernorm_2 is not None
        residual, dense, x, chosen, weights = norm_router(
            x, residual, self.post_attention_layernorm, self.pre_feedforward_layernorm,
            self.gate_up_proj, self.pre_feedforward_layernorm_2, self.router_scale,
            self.router_proj, self.per_expert_scale, counter, top_k=self.config.top_k_experts,
            pdl=True, **self.norms,
        )  # fmt: skip
        x, dense = experts(
            x, self.experts_gate_up_proj, self.experts_down_proj, chosen, weights, dense,
            self.down_proj, pdl=True,
        )  # fmt: skip
        x = add_norm(
            x, dense, self.post_feedforward_layernorm_2,
            residual_weight=self.post_feedforward_layernorm_1, pdl=True, **self.norms,
        )  # fmt: skip
        return x, residual

    def attend(self, qkv: Tensor, context: Context, keep: int) -> Tensor:
        """Writes the K and V in qkv :: [b, t, heads * d] to the cache, and returns attention's
        output for the last tokens :: [b, keep, n * m * d]."""
        config, shape, cache = self.config, self.shape, context.cache
        (b, t, _), d, heads = qkv.shape, shape.head_dim, config.num_attention_heads
        shares = shape.kv_layer != self.index
        options: dict[str, Any] = {
            "scale": config.query_pre_attn_scalar**-0.5, "window": shape.window,
            "softcap": config.attn_logit_softcapping, **self.norms,
        }  # fmt: skip
        qkv = qkv.view(b, t, -1, d)  # [b, t, heads, d]
        if t == 1:
            cos, sin = context.angles[shape.kind]
            out = decode_attention(
                qkv.squeeze(1), cache.keys[shape.kv_layer], cache.values[shape.kv_layer], cos, sin,
                context.query_offset, cache.counter, self.q_norm, self.k_norm, pdl=True,
                heads="q" if shares else "qk" if shape.k_eq_v else "qkv", v_norm=config.v_norm,
                **options,
            )  # fmt: skip
            return out.view(b, 1, heads * d)
        keys, values = context.rings[shape.kv_layer] if shares else self.write(qkv, context)
        q = qkv[:, t - keep :, :heads]  # [b, keep, heads, d]
        context = context.last(keep, t) if 0 < keep < t else context
        cos, sin = context.angles[shape.kind]
        if keep == 1:
            out = decode_attention(
                q.squeeze(1), keys, values, cos, sin, context.query_offset, cache.counter,
                self.q_norm, heads="q", **options,
            )  # fmt: skip
        elif keep:
            out = attention(q, keys, values, cos, sin, context.query_offset, self.q_norm, **options)
        else:
            out = q
        return out.reshape(b, keep, heads * d)

    def write(self, qkv: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Writes the K and V in qkv :: [b, t, heads, d] to the cache. Returns rings that contain
        them and all earlier tokens that they see."""
        t, heads = qkv.shape[1], self.config.num_attention_heads
        n, cache = self.shape.num_key_value_heads, context.cache
        cos, sin = context.angles[self.shape.kind]
        k, v = qkv[:, :, heads : heads + n], qkv[:, :, -n:]
        keys, values = cache.rings(self.index, t)
        rotary_write(
            k, v, keys, values, cos, sin, context.query_offset, self.k_norm,
            v_norm=self.config.v_norm, **self.norms,
        )  # fmt: skip
        cache.keep(self.index, keys, values, t)
        if self.kv_is_read:
            context.rings[self.index] = keys, values
        return keys, values


def frozen(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape), requires_grad=False)
