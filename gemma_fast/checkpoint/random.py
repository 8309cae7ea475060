"""Defines a checkpoint of random weights, which are generated from a seed."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from gemma_fast.checkpoint.base import Checkpoint
from gemma_fast.config import NO_SUFFIX, GemmaConfig

FACTORS = ("norm.weight", "norm_1.weight", "norm_2.weight", *NO_SUFFIX)  # ends of names
# End of a name → mean of the factors. Default: 1
MEANS = {"router.scale": 100.0, "post_feedforward_layernorm_2.weight": 0.25}
PART = 1 << 24  # numbers that are drawn at once; another value gives other numbers


class RandomCheckpoint(Checkpoint):
    """Draws weights from normal(mean, 0.02), for tests, and for benchmarks without a download.

    Tensor name, seed, shape and device determine the values, which are then rounded to the dtype.
    """

    def __init__(self, config: GemmaConfig, seed: int = 0, name: str = "random weights") -> None:
        self.config, self.seed, self.path = config, seed, Path(name)
        self.generation_config = {}
        self.shapes = config.tensor_shapes()
        self._drawing, self._begin = ("", ""), 0  # what `rows` has drawn last
        self._parts: Iterator[Tensor] = iter(())
        self._part = torch.empty(0)

    def mean(self, name: str) -> float:
        """Returns the mean of a tensor's values: 0, except for Gemma 4's factors.

        Gemma 4 stores these factors themselves, and other families store factor - 1. With zeros the
        logits would be constant, so their mean is 1. Gemma 4 does not scale scores by
        head_dim^-0.5, so the norms of queries and keys do, as trained ones would. With a mean of 1,
        each query would see one key, and rounding to bfloat16 would change most of the logits.
        Rounding also changes which experts a token uses. The router's scores have a standard
        deviation of 2, so that experts near the limit have small weights, and the output of the
        experts is a quarter of the MLP's.
        """
        if not name.endswith(FACTORS):
            return 0.0
        mean = next((mean for end, mean in MEANS.items() if name.endswith(end)), 1.0)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            mean = self.shapes[name][0] ** -0.25
        return mean * (1 - self.config.norm_offset)

    def rows(self, name: str, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        """Returns rows `start` to `stop` - 1 of a matrix, in float32. Reading all rows in order
        draws each number once."""
        rows, width = self.shapes[name]
        begin, end = start * width, min(stop, rows) * width
        if (name, str(device)) != self._drawing or begin < self._begin:
            self._drawing, self._begin = (name, str(device)), 0
            self._parts = self._draw(name, device)
            self._part = next(self._parts)
        found = []
        while begin < end:
            if begin >= self._begin + len(self._part):
                self._begin += len(self._part)
                self._part = next(self._parts)
                continue
            found.append(self._part[begin - self._begin : end - self._begin])
            begin += len(found[-1])
        return torch.cat(found).view(-1, width)

    def _read(self, name: str, out: Tensor) -> None:
        flat, begin = out.view(-1), 0
        for part in self._draw(name, out.device):
            flat[begin : begin + len(part)] = part
            begin += len(part)

    def _draw(self, name: str, device: torch.device | str) -> Iterator[Tensor]:
        """Yields a tensor's values in order, PART at a time."""
        seed, mean = self.seed + zlib.crc32(name.encode()), self.mean(name)
        generator = torch.Generator(device).manual_seed(seed)
        count = math.prod(self.shapes[name])
        for begin in range(0, count, PART):
            # PyTorch's generator gives different numbers in each dtype, so always use float32.
            part = torch.empty(min(PART, count - begin), dtype=torch.float32, device=device)
            yield part.normal_(mean, 0.02, generator=generator)
