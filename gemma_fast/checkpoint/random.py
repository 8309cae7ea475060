"""Defines a checkpoint of random weights, which are generated from a seed."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from torch import Tensor

from gemma_fast.checkpoint.base import Checkpoint
from gemma_fast.config import GemmaConfig


class RandomCheckpoint(Checkpoint):
    """Draws weights from normal(mean, 0.02), for tests, and for benchmarks without a download.

    Tensor name, seed, shape and device determine the values, which are then rounded to the dtype.
    """

    def __init__(self, config: GemmaConfig, seed: int = 0, name: str = "random weights") -> None:
        self.config, self.seed, self.path = config, seed, Path(name)
        self.generation_config = {}
        self.shapes = config.tensor_shapes()

    def mean(self, name: str) -> float:
        """Returns the mean of a tensor's values: 0, except for Gemma 4's norms and layer_scalar.

        Gemma 4 stores these factors themselves, and other families store factor - 1. With zeros the
        logits would be constant, so their mean is 1. Gemma 4 does not scale scores by
        head_dim^-0.5, so the norms of queries and keys do, as trained ones would. With a mean of 1,
        each query would see one key, and rounding to bfloat16 would change most of the logits.
        """
        if not name.endswith(("norm.weight", "layer_scalar")):
            return 0.0
        scores = name.endswith(("q_norm.weight", "k_norm.weight"))
        factor = self.shapes[name][0] ** -0.25 if scores else 1.0
        return factor * (1 - self.config.norm_offset)

    def _read(self, name: str, out: Tensor) -> None:
        seed, mean = self.seed + zlib.crc32(name.encode()), self.mean(name)
        generator = torch.Generator(out.device).manual_seed(seed)
        for part in out.view(-1).split(1 << 24):
            # PyTorch's generator gives different numbers in each dtype, so always use float32.
            drawn = torch.empty(part.shape, dtype=torch.float32, device=out.device)
            part.copy_(drawn.normal_(mean, 0.02, generator=generator))
