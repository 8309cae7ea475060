"""Check of the embedding lookup with scaling. It has no suite, so it is not timed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_fast.benchmarks.kernels.rmsnorm import ROWS
from gemma_fast.benchmarks.kernels.suite import Call, Check
from gemma_fast.kernels.embed import embed


def inputs(rows: int, dim: int, **make: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ids :: [1, rows], weight :: [999, dim] and Gemma's scale, sqrt(dim), in the dtype."""
    ids = torch.randint(999, (1, rows), device=make["device"])
    return ids, torch.randn(999, dim, **make), torch.tensor(dim**0.5, **make)


def formula(ids: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return F.embedding(ids, weight) * scale


def ours(ids: Tensor, weight: Tensor, scale: Tensor) -> Call:
    return lambda: embed(ids, weight, weight.shape[1] ** 0.5, pdl=True)


CHECKS = (Check("embed", inputs, formula, ours, ROWS),)
