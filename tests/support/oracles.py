"""Contains plain fp64 references for the kernel tests, independent of the kernels' code."""

import math

import torch


def geglu_oracle(gate_up):
    gate, up = gate_up.double().chunk(2, dim=-1)
    z = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return gate / 2 * (1 + torch.tanh(z)) * up


def root_sum_square(x, weight):
    """Returns the size of the sums of x @ weightᵀ: the root of the sum of squared terms."""
    return (x.double().square() @ weight.double().square().T).sqrt()


def angles(start, t, d=32):
    """Returns cos and sin :: [b, t, d / 2], fp32. Positions of row i begin at start[i]."""
    positions = start.unsqueeze(1) + torch.arange(t, device=start.device)
    i = torch.arange(0, d, 2, device=start.device)
    angle = positions.unsqueeze(2).float() * 100.0 ** (-i / d)
    return angle.cos(), angle.sin()


def normed(x, weight=None, offset=1.0):
    """Divides x by its RMS over the last axis. With a weight, multiplies by offset + weight."""
    x = x.double()
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return x if weight is None else x * (offset + weight.double())


def normed_and_rotated(x, positions, weight, offset=1.0):
    """Rotates x :: [t, heads, d] by positions :: [t]. If weight is given, normalizes x first."""
    x = x.double() if weight is None else normed(x, weight, offset)
    i, d = torch.arange(0, x.shape[-1], 2, device=x.device), x.shape[-1]
    angle = (positions.unsqueeze(1).float() * 100.0 ** (-i / d)).double().unsqueeze(1)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * angle.cos() - x2 * angle.sin(), x2 * angle.cos() + x1 * angle.sin()), -1)


def softmax_attention(q, k, v, q_positions, k_positions, window, softcap, scale):
    """Computes attention of q :: [t, heads, d] over k, v :: [s, n, d]. q and k are already rotated;
    the positions, [t] and [s], define the mask. Returns the result and the size of its sums over
    keys (the root of the sum of squared terms), both [t, heads, d]."""
    m = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(m, dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = q_positions.unsqueeze(1) - k_positions.unsqueeze(0)
    hidden = (distance < 0) | (distance >= (window or 1 << 30))
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    square = torch.einsum("hts,shd->thd", weights.square(), v.square())
    return torch.einsum("hts,shd->thd", weights, v), square.sqrt()
