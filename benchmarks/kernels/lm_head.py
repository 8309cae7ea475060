"""The next token: last norm, product with the embedding, and the choice."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_fast.benchmarks.kernels.suite import EAGER, OURS, Call, Suite, compiled
from gemma_fast.benchmarks.measure.machine import Work
from gemma_fast.kernels.lm_head import next_token

EPS = 1e-6


def inputs(
    device: torch.device, dtype: torch.dtype, b: int, vocab: int, dim: int, sampled: bool
) -> tuple[Any, ...]:
    """x, residual :: [b, dim], norm_weight :: [dim], weight :: [vocab, dim], temperature :: [b]

    Hiddens point to one token, far ahead of all others: rounding does not change it, nor noise.
    """
    make: dict[str, Any] = {"device": device, "dtype": dtype}
    weight = torch.randn(vocab, dim, **make).mul_(dim**-0.5)
    residual, norm_weight = torch.randn(b, dim, **make), torch.randn(dim, **make) / 4
    x = weight[torch.randint(vocab, (b,), device=device)] * dim**0.5 - residual
    temperature = torch.full((b,), 0.25, device=device) if sampled else None
    return x, residual, norm_weight, weight, temperature


def work(itemsize: int, b: int, vocab: int, dim: int, sampled: bool) -> Work:
    """The weight is read, x, residual and norm_weight too; a row a token is written."""
    return Work((vocab * dim + (3 * b + 1) * dim) * itemsize, 2 * b * vocab * dim)


def eager(
    x: Tensor, residual: Tensor, norm_weight: Tensor, weight: Tensor, temperature: Tensor | None
) -> Tensor:
    """The chosen tokens' rows of the weight, [b, dim]: ids would not compare as numbers do."""
    hiddens = F.rms_norm(residual + x, norm_weight.shape, 1 + norm_weight, EPS)
    scores = F.linear(hiddens, weight).float()
    if temperature is not None:  # as gpt-fast draws: torch.multinomial would wait for the host
        probabilities = (scores / temperature[:, None]).softmax(-1)
        scores = probabilities / torch.empty_like(probabilities).exponential_(1)
    return F.embedding(scores.argmax(-1), weight)


def oracle(x: Tensor, residual: Tensor, norm_weight: Tensor, weight: Tensor, _: Any) -> Tensor:
    return eager(x, residual, norm_weight, weight, None)


def ours(
    x: Tensor, residual: Tensor, norm_weight: Tensor, weight: Tensor, temperature: Tensor | None
) -> Call:
    b, device = len(x), x.device
    position, arrived = torch.zeros(2, b, dtype=torch.int32, device=device)
    token = torch.zeros(b, dtype=torch.int64, device=device)
    seed = None if temperature is None else torch.ones(b, dtype=torch.int64, device=device)

    def call() -> Tensor:
        next_token(
            x, residual, norm_weight, None, weight, position, token, arrived, temperature, seed,
            eps=EPS, prefetch=True,
        )  # fmt: skip
        return F.embedding(token.clamp(min=0), weight)  # -1: logits that are not finite

    return call


LM_HEAD = Suite(
    name="lm_head",
    about="Norm, product with [vocab, dim] and choice of b tokens, and their rows of it",
    yardstick=True,
    sizes={
        f"{vocab} x {dim}, b {b}{', sampled' * sampled}": {
            "b": b, "vocab": vocab, "dim": dim, "sampled": sampled,
        }
        for vocab, dim in ((256_000, 2048), (262_144, 640))  # Gemma 2B, Gemma 3 270M
        for b, sampled in ((1, False), (8, False), (1, True))
    },
    tiny={
        "199 x 64, b 1, sampled": {"b": 1, "vocab": 199, "dim": 64, "sampled": True},
        "199 x 64, b 3": {"b": 3, "vocab": 199, "dim": 64, "sampled": False},
    },
    inputs=inputs,
    oracle=oracle,
    work=work,
    providers={
        EAGER: lambda *inputs: lambda: eager(*inputs),
        "torch.compile": lambda *inputs: lambda: compiled(eager)(*inputs),
        OURS: ours,
    },
)  # fmt: skip
