"""`Gemma` runs the steps of reference.py on the kernels, with a KV cache.

    token ids → embed → layers (attention, MLP) → final norm → logits → next token

The op of each norm also computes the residual addition before it. On a GPU the ops run Triton
kernels, or cuBLAS for matmuls with many rows. On a CPU they run the C kernels of kernels/cpu/, or
their PyTorch references if these cannot be compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gemma_fast.config import GemmaConfig
from gemma_fast.kernels.attention import HEAD_DIMS
from gemma_fast.kernels.cpu.replay import Replay
from gemma_fast.kernels.embed import embed
from gemma_fast.kernels.lm_head import next_token, soft_cap_logits
from gemma_fast.kernels.matvec import linear, norm_linear
from gemma_fast.kernels.packed import PackedWeight
from gemma_fast.kernels.per_layer import per_layer_inputs
from gemma_fast.kernels.sample import sample_token
from gemma_fast.model.cache import KVCache
from gemma_fast.model.layer import Layer, frozen
from gemma_fast.model.rope import Rope
from gemma_fast.model.stream import Context, Residual


class Sampler(Protocol):
    """The attributes with which `Gemma.step` samples the next token of each of b rows.

    token        [b], int64: output, the next token, or -1 if the logits are not finite
    temperature  [b], fp32; 0: take the most likely token. None: 0 in every row
    seed         [b], int64: seed of the sampling noise; None if temperature is None
    process      function from logits :: [b, vocab] to the logits that are sampled; None: the logits
                 are sampled unchanged

    engine/sampling.py implements this protocol.
    """

    token: Tensor

    @property
    def temperature(self) -> Tensor | None: ...
    @property
    def seed(self) -> Tensor | None: ...
    @property
    def process(self) -> Callable[[Tensor], Tensor] | None: ...


# Weights of the per-layer embeddings. Only some models have them.
PER_LAYER_WEIGHTS = (
    "embed_tokens_per_layer", "per_layer_model_projection", "per_layer_projection_norm",
)  # fmt: skip


class Gemma(nn.Module):
    """The weights of Gemma 1 to 4 (text), and its forward pass.

    The weights are frozen, because the kernels have no backward. A new instance has uninitialized
    weights. state_dict() contains fused weights, so another instance can load it, but it does not
    have the layout of a checkpoint.
    """

    head_dims = HEAD_DIMS  # head dims that the kernels support on a GPU
    embed_tokens_per_layer: Tensor | None
    per_layer_model_projection: Tensor | None
    per_layer_projection_norm: Tensor | None

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = frozen(config.vocab_size, config.hidden_size)
        self.layers: Sequence[Layer] = nn.ModuleList(  # type: ignore[assignment]
            Layer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = frozen(config.hidden_size)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else frozen(config.vocab_size, config.hidden_size)
        shapes = config.tensor_shapes()
        for name in PER_LAYER_WEIGHTS:
            shape = shapes.get(f"model.{name}.weight")
            self.register_parameter(name, None if shape is None else frozen(*shape))
        self.rope = Rope(config)
        self.norms: dict[str, Any] = {"eps": config.rms_norm_eps, "offset": config.norm_offset}

    @property
    def parts(self) -> dict[str, list[str]]:
        """Maps each parameter's name to the names of the checkpoint's tensors stacked in it."""
        parts = {"embed_tokens": ["model.embed_tokens.weight"], "norm": ["model.norm.weight"]}
        if self.lm_head is not None:
            parts["lm_head"] = ["lm_head.weight"]
        if self.embed_tokens_per_layer is not None:
            parts |= {name: [f"model.{name}.weight"] for name in PER_LAYER_WEIGHTS}
        for i, layer in enumerate(self.layers):
            parts |= {f"layers.{i}.{name}": given for name, given in layer.parts.items() if given}
        return parts

    @property
    def output_weight(self) -> Tensor:
        """Weight of the output projection :: [vocab, hidden]: the embedding, or its own weight."""
        return self.embed_tokens if self.lm_head is None else self.lm_head

    @property
    def device(self) -> torch.device:
        return self.norm.device

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.dtype

    def new_cache(self, batch: int, max_length: int, *, grows: bool = False) -> KVCache:
        """Returns an empty cache for this model, see KVCache."""
        return KVCache(
            self.config, batch, max_length,
            dtype=self.dtype, device=self.device, grows=grows, rope=self.rope,
        )  # fmt: skip

    def step(
        self, ids: Tensor, cache: KVCache, sampler: Sampler, replay: Replay | None = None
    ) -> None:
        """Runs the forward pass on ids :: [b, t], which follow the cached tokens. Samples the next
        token of each row, and writes it to sampler.token.

        The caller must have reserved room for t tokens in the cache. replay: see hidden_states.
        """
        hiddens = self.hidden_states(ids, cache, 1, replay).last(1)
        position, counter, token = cache.next_position, cache.counter, sampler.token
        settings = sampler.temperature, sampler.seed
        if sampler.process is not None:
            logits = sampler.process(self.logits(hiddens)[:, -1])
            sample_token(logits, position, token, counter, *settings)
            return
        assert hiddens.residual is not None
        next_token(
            hiddens.x[:, -1], hiddens.residual[:, -1], self.norm, hiddens.post_norm,
            self.output_weight, position, token, counter, *settings,
            softcap=self.config.final_logit_softcapping, layer_scalar=hiddens.layer_scalar,
            pdl=True, **self.norms,
        )  # fmt: skip

    def hidden_states(
        self, ids: Tensor, cache: KVCache, keep: int | None = None, replay: Replay | None = None
    ) -> Residual:
        """Returns the residual stream of ids :: [b, t] after the last layer, before the final norm.

        Adds the t tokens to the cache, in which the caller must have reserved room for them.

        keep  number of last tokens that the caller needs; None: all. The last layer with K and V of
              its own, and the layers after it, compute only these after its K and V; the returned
              stream has only these, and with 0 it has no meaning
        replay  runs the layers, and repeats their C calls in later calls; all calls must have the
              same cache and the same number of rows and tokens. None: the layers run
        """
        t = ids.shape[1]
        keep = t if keep is None else min(keep, t)
        assert cache.length + t <= cache.max_length, f"no room for {t} tokens: {cache.length=}"
        with cache.unfinished("a forward pass did not finish"):
            scale = self.config.hidden_size**0.5
            embeddings = embed(ids, self.embed_tokens, scale, dtype=self.dtype, pdl=True)
            layers = functools.partial(self._run_layers, cache, keep)
            inputs = embeddings, self.per_layer(ids, embeddings)
            stream = layers(*inputs) if replay is None else replay(layers, *inputs)
            cache.advance(t)
        return stream

    def _run_layers(
        self, cache: KVCache, keep: int, embeddings: Tensor, per_layer: Tensor | None
    ) -> Residual:
        t, stream = embeddings.shape[1], Residual(embeddings)
        context = Context(cache, cache.next_position, cache.angles_of(t), per_layer, {})
        own = self.config.num_hidden_layers - self.config.num_kv_shared_layers
        for i, layer in enumerate(self.layers[: None if keep else own]):
            if i < own - 1:
                stream = layer(stream, context)
                continue
            # The next layers read this layer's stream only for the last tokens.
            stream = layer(stream, context, keep)
            if i == own - 1 and 0 < keep < t:
                context = context.last(keep, t)
        return stream

    def per_layer(self, ids: Tensor, embeddings: Tensor) -> Tensor | None:
        """Returns the inputs of the layers' gates :: [b, t, layers, p], or None if the model has no
        per-layer embeddings. embeddings: those of ids :: [b, t, hidden]."""
        if self.embed_tokens_per_layer is None:
            return None
        assert self.per_layer_model_projection is not None
        assert self.per_layer_projection_norm is not None
        projected = linear(embeddings, self.per_layer_model_projection, pdl=True)
        return per_layer_inputs(
            projected, ids, self.embed_tokens_per_layer, self.per_layer_projection_norm,
            scale=self.config.hidden_size**-0.5, pdl=True, **self.norms,
        )  # fmt: skip

    def logits(self, hiddens: Residual) -> Tensor:
        """Returns logits :: [b, t, vocab]."""
        logits, _ = norm_linear(
            hiddens.x, hiddens.residual, self.norm, hiddens.post_norm, self.output_weight,
            layer_scalar=hiddens.layer_scalar, **self.norms,
        )  # fmt: skip
        return soft_cap_logits(logits, self.config.final_logit_softcapping)

    def _apply(self, fn: Any, recurse: bool = True) -> Gemma:
        self.rope.clear()  # the weights may move to another device
        table = self.embed_tokens_per_layer
        if table is None or table.device == self.device:
            return super()._apply(fn, recurse)
        self.embed_tokens_per_layer = None  # it stays in host memory
        super()._apply(fn, recurse)
        parameters = table.parameters() if isinstance(table, PackedWeight) else [table]
        for x in parameters:
            converted = x.data if isinstance(table, PackedWeight) else x.data.to(self.dtype)
            x.data = converted.pin_memory() if self.device.type == "cuda" else converted
        self.embed_tokens_per_layer = table
        return self
