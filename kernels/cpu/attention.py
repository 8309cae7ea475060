"""Attention of a prompt through PyTorch's `scaled_dot_product_attention`.

The queries of a block share a call, so that keys outside of their causal mask and window are not
multiplied: 4.3 instead of 6.2 ms for 512 tokens with 4 heads of 256 on 2 cores of an AMD EPYC. The
m query heads of a kv head are rows of one matrix, so that its keys are not copied.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_fast.kernels.cpu import calls

BLOCK = 128  # queries


def attention(
    q: Tensor, keys: Tensor, values: Tensor, cos: Tensor | None, sin: Tensor | None,
    query_offset: Tensor, norm_weight: Tensor | None, *, scale: float,
    left_padding: Tensor | None, window: int | None, eps: float, offset: float,
) -> Tensor:  # fmt: skip
    """As the op of this name, without soft cap."""
    b, t, heads, d = q.shape
    n, slots = keys.shape[1:3]
    rotated = torch.empty(b, heads, t, d, dtype=q.dtype)
    calls.rotary(q, rotated, cos, sin, norm_weight, eps=eps, offset=offset)
    rotated = rotated.view(b, n, heads // n, t, d)
    oldest = torch.zeros_like(query_offset) if left_padding is None else left_padding.clamp(min=0)
    first, last = int(query_offset.min()), int(query_offset.max()) + t  # positions of queries
    out = torch.empty(b, t, n, heads // n, d, dtype=q.dtype)
    for start in range(0, t, BLOCK):
        stop = min(start + BLOCK, t)
        begin, end = 0, slots  # slots that the block reads
        if last <= slots:  # the ring has not wrapped: slot p holds position p
            end = last - t + stop
            begin = 0 if window is None else max(first + start - window + 1, 0)
        position = query_offset[:, None] + torch.arange(start, stop, dtype=torch.int32)
        key = torch.arange(begin, end, dtype=torch.int32)  # slots; below, positions
        newest = query_offset[:, None] + (t - 1)  # [b, 1]
        key = key.expand(b, -1) if last <= slots else newest - (newest - key) % slots  # [b, keys]
        block = rotated[:, :, :, start:stop].reshape(b, n, -1, d)  # [b, n, m * block, d]
        mask = _visible(position, key, oldest, window)  # [b, block, keys]
        hidden = ~mask.any(-1)  # [b, block]: queries that see nothing
        mask = mask[:, None, None].expand(b, 1, heads // n, -1, -1).flatten(2, 3)
        y = F.scaled_dot_product_attention(
            block, keys[:, :, begin:end], values[:, :, begin:end], mask, scale=scale
        )
        y = y.view(b, n, heads // n, stop - start, d).permute(0, 3, 1, 2, 4)
        if hidden.any():
            y = y.masked_fill(hidden[:, :, None, None, None], 0)
        out[:, start:stop] = y
    return out.view(b, t, heads, d)


def _visible(position: Tensor, key: Tensor, oldest: Tensor, window: int | None) -> Tensor:
    """Whether queries at position :: [b, q] see keys at key :: [b, keys]: [b, q, keys]."""
    position, key = position[:, :, None], key[:, None, :]
    visible = (key <= position) & (key >= oldest[:, None, None])
    return visible if window is None else visible & (key > position - window)
