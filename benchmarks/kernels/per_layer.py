"""Suite of the per-layer inputs of Gemma 4: for the token of a decode step, and for prompts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_fast.benchmarks.kernels.rivals import plain, torch_compiled
from gemma_fast.benchmarks.kernels.rmsnorm import EPS
from gemma_fast.benchmarks.kernels.suite import Check, Suite, Tuning
from gemma_fast.benchmarks.measure.machine import Work
from gemma_fast.benchmarks.measure.outcome import EAGER, OURS, OURS_ALONE
from gemma_fast.kernels.per_layer import per_layer_inputs

VOCAB, SCALE = 999, 1536**-0.5
OPTIONS = {"scale": SCALE, "eps": EPS, "offset": 0.0}


def inputs(tokens: int, layers: int, p: int, **make: Any) -> tuple[Tensor, ...]:
    """Returns projected :: [1, tokens, layers * p], ids :: [1, tokens],
    table :: [VOCAB, layers * p] and norm_weight :: [p]."""
    projected = torch.randn(1, tokens, layers * p, **make) / SCALE
    ids = torch.randint(VOCAB, (1, tokens), device=make["device"])
    table = torch.randn(VOCAB, layers * p, **make) * p**-0.5
    return projected, ids, table, torch.randn(p, **make)


def work(itemsize: int, tokens: int, layers: int, p: int) -> Work:
    """Counts the bytes of the projection, rows of the table and the result, and eight FLOPs per
    element: four of the norm, two factors before the sum, the sum and a factor after it."""
    elements = tokens * layers * p
    return Work(3 * elements * itemsize, 8 * elements)


def formula(projected: Tensor, ids: Tensor, table: Tensor, norm_weight: Tensor) -> Tensor:
    p = norm_weight.shape[0]
    x, rows = (z.unflatten(-1, (-1, p)) for z in (projected * SCALE, F.embedding(ids, table)))
    return (F.rms_norm(x, (p,), norm_weight, EPS) + rows * p**0.5) * 0.5**0.5


PER_LAYER_INPUTS = Suite(
    name="per_layer_inputs",
    about="Per-layer inputs of Gemma 4 E2B: RMSNorm of [tokens, 35, 256] plus rows of a table",
    yardstick=True,
    sizes={
        f"t {tokens}, 35 x 256": {"tokens": tokens, "layers": 35, "p": 256}
        for tokens in (1, 2048, 8192)
    },
    tiny={"t 3, 2 x 48": {"tokens": 3, "layers": 2, "p": 48}},
    inputs=inputs,
    oracle=formula,
    work=work,
    tuning=Tuning("per_layer_inputs", lambda size: {"BLOCK_R": (1, 2, 4, 8), "num_warps": (1, 2)}),
    providers={
        EAGER: plain(formula),
        "torch.compile": torch_compiled(formula),
        OURS_ALONE: plain(partial(per_layer_inputs, **OPTIONS, pdl=False)),
        OURS: plain(partial(per_layer_inputs, **OPTIONS, pdl=True)),
    },
)
SIZES = {"tokens": 2, "layers": 3, "p": 48}, {"tokens": 64, "layers": 35, "p": 256}
CHECKS = (Check("per_layer_inputs", inputs, formula, PER_LAYER_INPUTS.providers[OURS], SIZES),)
