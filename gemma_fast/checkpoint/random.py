"""Defines a checkpoint of random weights, which are generated from a seed."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from torch import Tensor

from gemma_fast.checkpoint.base import Checkpoint
from gemma_fast.config import GemmaConfig


class RandomCheckpoint(Checkpoint):
    """Draws weights from normal(0, 0.02), for tests, and for benchmarks without a download. Factors
    (Gemma 4's norms and layer_scalar, which are not stored as factor - 1) are from normal(1, 0.02).

    Tensor name, seed, shape and device determine the values, which are then rounded to the dtype.
    """

    def __init__(self, config: GemmaConfig, seed: int = 0, name: str = "random weights") -> None:
        self.config, self.seed, self.path = config, seed, Path(name)
        self.generation_config = {}
        self.shapes = config.tensor_shapes()

    def _read(self, name: str, out: Tensor) -> None:
        seed = self.seed + zlib.crc32(name.encode())
        factor = name.endswith(("norm.weight", "layer_scalar"))
        mean = 1 - self.config.norm_offset if factor else 0.0
        generator = torch.Generator(out.device).manual_seed(seed)
        for part in out.view(-1).split(1 << 24):
            # PyTorch's generator gives different numbers in each dtype, so always use float32.
            drawn = torch.empty(part.shape, dtype=torch.float32, device=out.device)
            part.copy_(drawn.normal_(mean, 0.02, generator=generator))
