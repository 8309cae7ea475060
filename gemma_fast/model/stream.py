"""The residual stream, and the inputs of a forward pass that its layers share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from gemma_fast.model.cache import KVCache
from gemma_fast.model.rope import Tables


class Residual(NamedTuple):
    """The residual stream, stored as two terms, which the op of the next norm adds.

    x             [b, t, hidden], the previous layer's output, not yet added to `residual`
    residual      [b, t, hidden]; None: x is the embedding, and there is nothing to add
    post_norm     [hidden], weight of the norm that is applied to x before x is added; None: no norm
    layer_scalar  [1], multiplies the sum; None: the sum is the stream
    """

    x: Tensor
    residual: Tensor | None = None
    post_norm: Tensor | None = None
    layer_scalar: Tensor | None = None

    def last(self, tokens: int) -> Residual:
        """Returns the stream of only the last `tokens` tokens, or of all tokens if it is 0."""
        assert self.residual is not None
        x, residual = self.x[:, -tokens:], self.residual[:, -tokens:]
        return self._replace(x=x, residual=residual)


class Context(NamedTuple):
    """The inputs of one forward pass that its layers share.

    cache         receives the tokens' K and V
    query_offset  [b], int32: position of each row's first token in the stream
    angles        layer type → cos and sin of the tokens' rotary angles, from `cache.angles_of`
    per_layer     [b, t, layers, p]: inputs of the layers' gates; None: no per-layer embeddings
    rings         layer → its rings of K and V with all tokens, for later layers that read them;
                  empty in a decode step, where they read the cache
    """

    cache: KVCache
    query_offset: Tensor
    angles: Tables
    per_layer: Tensor | None
    rings: dict[int, tuple[Tensor, Tensor]]

    def last(self, tokens: int, of: int) -> Context:
        """Returns the context of only the last `tokens` of `of` tokens."""
        if tokens == 1:
            angles = self.cache.angles_of(1)
        else:
            angles = {
                kind: (cos[:, -tokens:].contiguous(), sin[:, -tokens:].contiguous())
                for kind, (cos, sin) in self.angles.items()
            }
        per_layer = None if self.per_layer is None else self.per_layer[:, -tokens:]
        return self._replace(
            query_offset=self.query_offset + (of - tokens), angles=angles, per_layer=per_layer
        )
