"""Bounds of rounding errors. They follow from the length of the sums, so they hold on every
machine, for every order of summation.

One rounding changes a number by at most u times its size. u is 2^-24 in fp32, 2^-11 in fp16 and
2^-8 in bf16. The errors of n roundings have different signs, so they add up to about sqrt(n) * u
and not to n * u. (Higham and Mary, "A new approach to probabilistic rounding error analysis".)

Count one rounding for each operation on the longest path to a result: n for a sum of n products,
because in the worst order each partial sum is rounded; 4 for exp, tanh, log, rsqrt, sin or a
division, because GPUs compute them with an error of up to 2 ulp.
"""

import torch
from torch import Tensor

from gemma_fast.config import GemmaConfig

# The standard deviation of one error is 0.43 * u, and that of a sum of n products in the worst
# order is 0.3 * sqrt(n) * u. So SPREAD is at least 7 standard deviations.
SPREAD = 3


def rounding_error(roundings: float, dtype: torch.dtype = torch.float32) -> float:
    """Returns the largest error of this many roundings, relative to the size of the numbers."""
    return SPREAD * roundings**0.5 * torch.finfo(dtype).eps / 2


def assert_rounded(
    found: Tensor, exact: Tensor, roundings: float, size: Tensor | float = 0.0, steps: int = 0
) -> None:
    """Asserts that `found` equals `exact` except for rounding errors.

    roundings  number of fp32 roundings on the path to a result
    size       size of the numbers that are rounded, where they are larger than the result: of a
               sum, the root of the sum of squared terms
    steps      number of intermediate results that are rounded to found.dtype
    """
    assert found.shape == exact.shape
    limits, exact = torch.finfo(found.dtype), exact.double()
    relative = rounding_error(roundings) + rounding_error(steps, found.dtype)
    last = limits.eps / 2 * exact.abs() + limits.smallest_normal * limits.eps / 2
    used = (found.double() - exact).abs() / (relative * (exact.abs() + size) + last)
    assert (used <= 1).all(), f"an error is {float(used.max()):.3g} times its bound"


def norm_roundings(dim: int) -> float:
    """Returns the number of roundings of an RMSNorm: its root halves the error of the sum."""
    return dim / 4 + 12


def pair_size(rotated: Tensor) -> Tensor:
    """Returns the size of the numbers in a rotation: the norm of the pair (i, i + d / 2)."""
    norm = torch.hypot(*rotated.double().chunk(2, dim=-1))
    return torch.cat((norm, norm), dim=-1)


GEGLU_ROUNDINGS = 16  # 8 operations, tanh or exp, and a division


def geglu_size(gate_up: Tensor, size: Tensor | float = 0.0) -> Tensor:
    """Returns the size of the numbers in GeGLU. gate_up has errors relative to `size`, which GeGLU
    multiplies by its derivatives: at most 1.13 * up and gate."""
    gate, up = gate_up.double().abs().chunk(2, dim=-1)
    of_gate, of_up = (torch.zeros_like(gate_up, dtype=torch.float64) + size).chunk(2, dim=-1)
    return gate * up + 1.13 * up * of_gate + gate * of_up


def attention_roundings(d: int, keys: int, scale: float) -> dict[str, float]:
    """Returns arguments of `assert_rounded` for attention with q, k and v of about 1.

    The error of a score is a relative error of its softmax weight. A score is a sum of d products
    with an RMS of sqrt(d) * scale. The largest weights have scores of about three times the RMS.
    Softmax and the weighted values are two sums over keys. In 16 bits, the rounded queries change
    scores, and weights are rounded.
    """
    square = d * scale**2
    return {"roundings": d * 9 * square + 2 * keys, "steps": square + 1}


def logits_error(config: GemmaConfig, tokens: int) -> float:
    """Returns the largest error of a model's fp32 logits, relative to their RMS.

    All sums on the path from a token to its logits add up. A relative error of queries and keys
    changes softmax weights by this error times the score, and scores are about 10.
    """
    roundings, hidden = config.hidden_size, config.hidden_size
    for layer in config.layers:
        heads = config.num_attention_heads * layer.head_dim
        roundings += hidden + layer.head_dim + 2 * tokens + heads
        roundings += hidden + layer.intermediate_size
        if config.num_experts:  # the router and the experts
            roundings += 2 * hidden + config.moe_intermediate_size + config.top_k_experts
        if config.hidden_size_per_layer_input:
            roundings += hidden + config.hidden_size_per_layer_input
    return 10 * rounding_error(roundings)
