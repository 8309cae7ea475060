"""What each kernel computes, op by op, as eager PyTorch and transformers do.

Run in a dtype it is eager, each step rounded to it but for norms and softmax, which are in fp32 at
least; run in float64 it is the truth. It shares nothing with kernels/. Each formula takes its
kernel's tensors, in the kernel's order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS, SOFTCAP = 1e-6, 30.0
Given = tuple[Any, ...]


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def embed(ids: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return F.embedding(ids, weight) * scale


def norm(x: Tensor, weight: Tensor | None) -> Tensor:
    """x itself where there is no weight."""
    if weight is None:
        return x
    z = wide(x)
    z = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + EPS)
    return (z * (1 + wide(weight))).to(x.dtype)


def add(x: Tensor, residual: Tensor, weight: Tensor, post: Tensor | None = None) -> Given:
    h = residual + norm(x, post)
    return norm(h, weight), h


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x :: [b, t, heads, d]; cos, sin :: [b, t, d / 2], rounded to x's dtype."""
    cos, sin = (torch.cat((y, y), dim=-1).to(x.dtype).unsqueeze(2) for y in (cos, sin))
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


def rotary(*given: Any) -> Given:
    """From position 0 on, as many tokens as slots."""
    k, v, _, _, cos, sin, _, weight = given
    return turn(norm(k, weight), cos, sin).transpose(1, 2), v.transpose(1, 2)


def attend(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, options: Any) -> Tensor:
    """q :: [b, t, heads, d], turned; keys, values :: [b, n, s, d]; hidden :: [t, s], or a row's"""
    keys, values = (x.repeat_interleave(q.shape[2] // x.shape[1], dim=1) for x in (keys, values))
    scores = q.transpose(1, 2) @ keys.mT * options["scale"]
    if softcap := options["softcap"]:
        scores = softcap * torch.tanh(scores / softcap)
    weights = wide(scores.masked_fill(hidden, -torch.inf)).softmax(-1).to(q.dtype)
    return (weights @ values).transpose(1, 2)


def attention(*given: Any) -> Tensor:
    q, keys, values, cos, sin, _, weight, options = given
    position = torch.arange(q.shape[1], device=q.device)
    distance = position[:, None] - position
    hidden = (distance < 0) | (distance >= (options["window"] or len(position)))
    return attend(turn(norm(q, weight), cos, sin), keys, values, hidden, options)


def decode(*given: Any) -> Tensor:
    """All rows at one position, in a ring that is full."""
    qkv, keys, values, cos, sin, position, q_weight, k_weight, options = given
    n, slots = keys.shape[1:3]
    q, k, v = qkv.unsqueeze(1).split((qkv.shape[1] - 2 * n, n, n), dim=2)  # [b, 1, heads, d]
    cos, sin = (x[position.long()].unsqueeze(1) for x in (cos, sin))
    q, k = turn(norm(q, q_weight), cos, sin), turn(norm(k, k_weight), cos, sin)
    slot = int(position[0]) % slots
    keys[:, :, slot], values[:, :, slot] = k.squeeze(1), v.squeeze(1)
    hidden = torch.zeros(1, slots, dtype=torch.bool, device=q.device)
    return attend(q, keys, values, hidden, options).squeeze(1)


def padded(*given: Any) -> Tensor:
    """q and keys are turned; a row's keys begin at its `first`."""
    q, keys, values, start, first, options = given
    query = start[:, None] + torch.arange(q.shape[1], device=q.device)
    distance = query[:, :, None] - torch.arange(keys.shape[2], device=q.device)  # [b, t, s]
    hidden = (distance < 0) | (distance > (query - first[:, None])[:, :, None])
    if window := options["window"]:
        hidden |= distance >= window
    return attend(q, keys, values, hidden.unsqueeze(1), options)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def product(x: Tensor, matrix: Tensor, gated: bool = True) -> Tensor:
    y = F.linear(x, matrix)
    return geglu(*y.chunk(2, dim=-1)) if gated else y


def norm_linear(*given: Any) -> Given:
    *tensors, matrix, gated = given
    normed, h = add(*tensors)
    return product(normed, matrix, gated), h


def logits(*given: Any) -> Tensor:
    *tensors, matrix = given
    return SOFTCAP * torch.tanh(F.linear(add(*tensors)[0], matrix) / SOFTCAP)
