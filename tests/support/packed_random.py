"""Random weights that are packed already, because rounding billions of numbers takes minutes."""

import torch
from packed_weights import value_range
from torch import Tensor

from gemma_fast.checkpoint.random import RandomCheckpoint
from gemma_fast.config import GemmaConfig
from gemma_fast.kernels.packed import PackedRows, Packing

DRAWN = (1 << 23) + 9  # a prime number: rows differ, although values repeat


class PackedRandomCheckpoint(RandomCheckpoint):
    """Matrices have values of about normal(0, 0.02)'s size. They repeat."""

    def __init__(self, config: GemmaConfig, packing: Packing) -> None:
        super().__init__(config)
        low, high = value_range(packing)
        generator = torch.Generator().manual_seed(0)
        self._values = torch.randint(
            low, high + 1, (DRAWN,), dtype=torch.int8, generator=generator
        )  # fmt: skip
        self._scale = (0.5 + torch.rand(DRAWN, generator=generator)) * 0.07 / (high - low)
        self._packing, self._next = packing, 0

    def packing(self, name: str) -> Packing | None:
        return self._packing if len(self.shapes[name]) == 2 else None

    def packed_rows(self, name: str, start: int, stop: int) -> PackedRows:
        width = self.shapes[name][1]
        groups = width // self._packing.group
        self._next += 7919
        values, scale = (self._take(x, stop - start, n) for x, n in (
            (self._values, width), (self._scale, groups)
        ))  # fmt: skip
        return PackedRows(values, scale, None)

    def _take(self, drawn: Tensor, rows: int, width: int) -> Tensor:
        first = self._next % (len(drawn) - rows * width)
        return drawn[first : first + rows * width].view(rows, width)
