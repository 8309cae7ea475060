"""Attention of a prompt through PyTorch's `scaled_dot_product_attention`.

The queries of a block share a call, so that keys outside of their causal mask and window are not
multiplied: 4.3 instead of 6.2 ms for 512 tokens with 4 heads of 256 on 2 cores of an AMD EPYC. The
m query heads of a kv head are rows of one matrix, so that its keys are not copied.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_fast.kernels._ring import visible_keys
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
    first, last = int(query_offset.min()), int(query_offset.max())  # positions of query 0
    causal = first == last >= 0 and last + t <= slots and left_padding is None
    visible = visible_keys(query_offset, left_padding, t, 0 if causal else slots, window)
    out = torch.empty(b, t, n, heads // n, d, dtype=q.dtype)
    for start in range(0, t, BLOCK):
        stop = min(start + BLOCK, t)
        if causal:  # slot p holds position p
            begin, end = max(first + start + 1 - (window or slots), 0), first + stop
            hidden = None
            mask = _causal_mask(stop - start, end - begin, window or slots, heads // n, q.dtype)
        else:
            begin, end = 0, slots
            hidden = ~visible[:, start:stop].any(-1)  # [b, block]: queries that see nothing
            mask = visible[:, start:stop] | hidden.unsqueeze(-1)  # [b, block, slots]
            mask = mask[:, None, None].expand(b, 1, heads // n, -1, -1).flatten(2, 3)
        y = F.scaled_dot_product_attention(
            rotated[:, :, :, start:stop].reshape(b, n, -1, d), keys[:, :, begin:end],
            values[:, :, begin:end], mask, scale=scale,
        )  # fmt: skip
        # [b, block, n, m, d]
        y = y.view(b, n, heads // n, stop - start, d).permute(0, 3, 1, 2, 4)
        out[:, start:stop] = y
        if hidden is not None:
            out[:, start:stop][hidden] = 0
    return out.view(b, t, heads, d)


@functools.lru_cache(maxsize=8)
def _causal_mask(t: int, keys: int, window: int, m: int, dtype: torch.dtype) -> Tensor:
    """Returns what is added to the scores :: [m * t, keys] of the last t of `keys` positions, for m
    heads: 0, or -inf where a query does not see a key."""
    query, key = torch.arange(keys - t, keys)[:, None], torch.arange(keys)
    hidden = (key > query) | (key <= query - window)
    mask = torch.zeros(t, keys, dtype=dtype).masked_fill(hidden, float("-inf"))
    return mask.repeat(m, 1)
