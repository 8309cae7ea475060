"""The steps of Gemma in plain PyTorch: one function of tensors for each step of the walk-through.

reference.py puts them together. This file shares no code with the model or the kernels.

    b batch · t new tokens · s past and new tokens · n kv heads · m query heads per kv head
    d head dim · heads: n * m for queries, n for keys and values

The steps follow Graphcore Research's "A transformer walk-through, with Gemma". The numerics follow
Google's gemma_pytorch and transformers: RMSNorm, rotary embedding and softmax are computed in fp32,
all other steps in the weights' dtype.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_fast.config import RopeParameters


def embed(input_ids: Tensor, embeddings: Tensor, width: int | None = None) -> Tensor:
    """Returns embeddings[input_ids] * sqrt(hidden) :: [b, t, hidden].

    input_ids :: [b, t]; embeddings :: [vocab, hidden]. sqrt(hidden) is rounded to the dtype of
    embeddings before the multiplication. width: replaces hidden under the root.
    """
    scale = torch.tensor((width or embeddings.shape[1]) ** 0.5).to(embeddings.dtype)
    return embeddings[input_ids] * scale.to(embeddings.device)


def visible_keys(mask: Tensor, t: int, window: int | None) -> Tensor:
    """Returns whether a new token sees a key :: [b, t, s], bool: its own key and all earlier ones,
    or the last `window` of them, except for padding.

    mask :: [b, s], 0 for padding; the last t of the s tokens are new
    """
    place = torch.arange(mask.shape[1], device=mask.device)
    age = place[-t:, None] - place  # [t, s]: 0 for a token's own key, negative for later keys
    seen = age >= 0 if window is None else (age >= 0) & (age < window)
    return seen & mask.bool()[:, None]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 1.0) -> Tensor:
    """Returns x / rms(x) * (offset + weight), computed in fp32 and rounded to x's dtype at the end.

    offset: 1 in Gemma 1 to 3, 0 in Gemma 4; weight None: returns x / rms(x).
    """
    z = wide(x)
    z = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + eps)
    return (z if weight is None else z * (offset + wide(weight))).to(x.dtype)


def angles(rope: RopeParameters, d: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cos and sin :: [b, 1, t, d / 2] of the rotary angles position * theta^(-2i / d).

    positions :: [b, t]; rope: the layer's rotary parameters. The angles are computed in fp32.
    Linear scaling divides all angles by rope.factor. YaRN divides those of slow channel pairs only,
    and multiplies cos and sin by rope.attention_factor. Proportional rotary embedding, of Gemma 4's
    full layers, rotates the first of the pairs only: the angles of the others are 0.
    """
    i = torch.arange(d // 2, dtype=torch.float32, device=positions.device)
    inv_freq = 1 / rope.rope_theta ** (2 * i / d)
    if rope.rope_type in ("linear", "proportional"):
        inv_freq = inv_freq / rope.factor
    if rope.rope_type == "proportional":
        inv_freq = inv_freq * (i < int(rope.partial_rotary_factor * d // 2))
    if rope.rope_type == "yarn":
        inv_freq = inv_freq * (1 - yarn_ramp(rope, i, d) * (1 - 1 / rope.factor))
    angles = positions[:, None, :, None].float() * inv_freq
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor


def yarn_ramp(rope: RopeParameters, i: Tensor, d: int) -> Tensor:
    """Returns 0 for channel pairs that YaRN leaves unchanged, 1 for those whose angles it divides,
    and values between 0 and 1 for the pairs between them :: [d / 2]. i :: [d / 2]: 0, 1, 2, …"""
    context = rope.original_max_position_embeddings
    rotations = torch.tensor([rope.beta_fast, rope.beta_slow], dtype=torch.float64)
    low, high = (
        d * torch.log(context / (2 * math.pi * rotations)) / (2 * math.log(rope.rope_theta))
    ).tolist()
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    return ((i - low) / max(high - low, 0.001)).clamp(0, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each channel pair (i, i + d / 2) of x :: [b, heads, t, d] by its angle, in fp32."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def attention_scores(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Returns scale * q @ keysᵀ :: [b, n * m, t, s].

    q :: [b, n * m, t, d]; keys :: [b, n, s, d]
    """
    m = q.shape[1] // keys.shape[1]
    return q @ keys.repeat_interleave(m, dim=1).transpose(2, 3) * scale


def attention_weights(scores: Tensor, visible: Tensor, softcap: float | None) -> Tensor:
    """Returns softmax(cap(scores)) over the visible keys :: [b, n * m, t, s], computed in fp32.

    scores :: [b, n * m, t, s]
    visible :: [b or 1, t, s], bool: whether a new token sees a key
    """
    scores = cap(scores, softcap)
    # A padding token sees no key. If its scores were all -inf, its softmax would be NaN.
    scores = scores.masked_fill(~visible[:, None], torch.finfo(scores.dtype).min)
    return wide(scores).softmax(-1).to(scores.dtype)


def attend(weights: Tensor, values: Tensor) -> Tensor:
    """Returns weights @ values :: [b, n * m, t, d]: for each query, the weighted sum of the values.

    weights :: [b, n * m, t, s]; values :: [b, n, s, d]
    """
    m = weights.shape[1] // values.shape[1]
    return weights @ values.repeat_interleave(m, dim=1)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Returns gelu(gate) * up, with the tanh approximation of GELU."""
    return F.gelu(gate, approximate="tanh") * up


def choose_experts(scores: Tensor, scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Returns the top_k experts of largest probability, and their weights :: [tokens, top_k].

    The weights of a token's experts are probabilities divided by their sum, times each expert's
    scale. scores :: [tokens, experts]; scale :: [experts]
    """
    weights, chosen = wide(scores).softmax(-1).topk(top_k)
    return chosen, weights / weights.sum(-1, keepdim=True) * scale[chosen]


def per_layer_inputs(embedded: Tensor, projected: Tensor) -> Tensor:
    """Returns the inputs of the layers' gates: (embedded + projected) / sqrt(2) :: [b, t, L, p].

    embedded   the token's per-layer embeddings :: [b, t, L, p]: one of width p for each of L layers
    projected  the projection of its embedding, normalized :: [b, t, L, p]
    """
    return (embedded + projected) * 2**-0.5


def cap(x: Tensor, softcap: float | None) -> Tensor:
    """Limits x smoothly to the range from -softcap to softcap. Returns x if softcap is None."""
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def wide(x: Tensor) -> Tensor:
    """Returns x in fp32, or unchanged if it is fp64."""
    return x if x.dtype == torch.float64 else x.float()
