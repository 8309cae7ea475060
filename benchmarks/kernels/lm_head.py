"""Suite of the next token: final norm, projection with the embedding, and argmax or sampling."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_fast.benchmarks.kernels import matvec
from gemma_fast.benchmarks.kernels.rivals import plain, torch_compiled
from gemma_fast.benchmarks.kernels.rmsnorm import EPS
from gemma_fast.benchmarks.kernels.suite import Call, Check, Choices, Size, Suite, Tuning
from gemma_fast.benchmarks.measure.machine import Work
from gemma_fast.benchmarks.measure.outcome import EAGER, OURS
from gemma_fast.kernels import lm_head as module
from gemma_fast.reference import cap

SOFTCAP = 30.0


def inputs(b: int, vocab: int, dim: int, sampled: bool, **make: Any) -> tuple[Any, ...]:
    """Returns x, residual :: [b, dim]; norm_weight :: [dim]; weight :: [vocab, dim]; temperature ::
    [b] or None.

    One token's logit is far above all other logits, so neither rounding nor the sampling noise
    changes the next token.
    """
    weight = torch.randn(vocab, dim, **make).mul_(dim**-0.5)
    residual, norm_weight = torch.randn(b, dim, **make), torch.randn(dim, **make) / 4
    x = weight[torch.randint(vocab, (b,), device=weight.device)] * dim**0.5 - residual
    temperature = torch.full((b,), 0.25, device=x.device) if sampled else None
    return x, residual, norm_weight, weight, temperature


def work(itemsize: int, b: int, vocab: int, dim: int, sampled: bool) -> Work:
    """Counts the bytes read (weight, x, residual, norm_weight), the bytes written (the embedding of
    each next token), and the FLOPs of the projection."""
    return Work((vocab * dim + (3 * b + 1) * dim) * itemsize, 2 * b * vocab * dim)


def eager(
    x: Tensor, residual: Tensor, norm_weight: Tensor, weight: Tensor, temperature: Tensor | None
) -> Tensor:
    """Returns the next tokens' embeddings :: [b, dim], because outcome.error cannot compare ids."""
    scores = matvec.norm_eager(x, residual, norm_weight, None, weight, False)[0].float()
    # Samples as gpt-fast does, by argmax(p / exponential noise), because torch.multinomial would
    # wait for the GPU.
    if temperature is not None:
        probabilities = (scores / temperature[:, None]).softmax(-1)
        scores = probabilities / torch.empty_like(probabilities).exponential_(1)
    return F.embedding(scores.argmax(-1), weight)


def ours(
    x: Tensor, residual: Tensor, norm_weight: Tensor, weight: Tensor, temperature: Tensor | None
) -> Call:
    call = choice(x, residual, norm_weight, None, weight, temperature, softcap=None)
    return lambda: F.embedding(call().clamp(min=0), weight)  # token -1: logits are not finite


def choice(
    x: Tensor, residual: Tensor, norm_weight: Tensor, post_norm_weight: Tensor | None,
    weight: Tensor, temperature: Tensor | None = None, softcap: float | None = SOFTCAP,
) -> Call:  # fmt: skip
    """Returns a function without arguments that runs the op and returns the next tokens :: [b]."""
    position, counter = torch.zeros(2, len(x), dtype=torch.int32, device=x.device)
    token = torch.full((len(x),), -1, device=x.device)
    seed = None if temperature is None else torch.ones(len(x), dtype=torch.int64, device=x.device)

    def call() -> Tensor:
        module.next_token(
            x, residual, norm_weight, post_norm_weight, weight, position, token, counter,
            temperature, seed, softcap=softcap, eps=EPS, pdl=True,
        )  # fmt: skip
        return token

    return call


def choice_inputs(**size: Any) -> tuple[Any, ...]:
    """Returns inputs of `choice`. The rows of the weight come in pairs that differ by a few ulps,
    so that rounding can change the next token."""
    *tensors, matrix, _ = matvec.norm_inputs(**size)
    off = 4 * torch.finfo(matrix.dtype).eps * torch.randn_like(matrix[1::2])
    matrix[1::2] = matrix[:-1:2] * (1 + off)
    return *tensors, matrix


def logits(*given: Any) -> Tensor:
    return cap(matvec.norm_formula(*given, False)[0], SOFTCAP)


def choices(size: Size) -> Choices:
    return matvec.matmul_choices(size, {
        "BLOCK_N": (4, 8), "BLOCK_K": (1024, 2048), "BLOCKS": (1, 4, 8, 16), "num_warps": (4, 8),
    })  # fmt: skip


LM_HEAD = Suite(
    name="lm_head",
    about="Norm, projection with [vocab, dim], b next tokens, and a lookup of their embeddings",
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
    oracle=lambda x, residual, norm, weight, _: eager(x, residual, norm, weight, None),
    work=work,
    tuning=Tuning("next_token", choices),
    providers={EAGER: plain(eager), "torch.compile": torch_compiled(eager), OURS: ours},
)  # fmt: skip
VOCAB = {"b": 8, "dim": 320, "out": 1001}, {"b": 8, "dim": 2304, "out": 50_001}
CHOICE = Check("next_token, 8 rows", choice_inputs, logits, choice, VOCAB, chooses=True)
CHECKS = (CHOICE, CHOICE.resized("next_token, 16 rows", b=16))
