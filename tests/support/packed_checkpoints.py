"""Random checkpoints in memory whose matrices are packed."""

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from gemma_fast.checkpoint.random import RandomCheckpoint
from gemma_fast.config import GemmaConfig
from gemma_fast.kernels.packed import PackedRows, Packing

# Name of a kind → function from the columns of a matrix to its packing.
KINDS: dict[str, Callable[[int], Packing]] = {
    "int8-g32": lambda dim: Packing(8, 32, False, torch.float16),
    "int8-g16": lambda dim: Packing(8, 16, False, torch.float32),
    "int8-g32-minimum": lambda dim: Packing(8, 32, True, torch.float32),
    "int8-g128": lambda dim: Packing(8, 128, False, torch.bfloat16),
    "int8-row": lambda dim: Packing(8, dim, False, torch.bfloat16),
    "int4-g32": lambda dim: Packing(4, 32, False, torch.float16),
    "int4-g32-minimum": lambda dim: Packing(4, 32, True, torch.float16),
    "int4-g128": lambda dim: Packing(4, 128, False, torch.bfloat16),
    "int4-g128-minimum": lambda dim: Packing(4, 128, True, torch.float32),
    "int4-row": lambda dim: Packing(4, dim, False, torch.bfloat16),
}


class PackedCheckpoint(RandomCheckpoint):
    """A checkpoint whose matrices have the packings of a kind, or with "mixed" one of all kinds.

    The integers cover their whole range. `_read` computes the same weights from them without the
    code of kernels/packed.py.
    """

    def __init__(self, config: GemmaConfig, kind: str) -> None:
        super().__init__(config)
        self.kind = kind

    def packing(self, name: str) -> Packing | None:
        shape = self.shapes[name]
        if len(shape) == 1:
            return None
        kinds = list(KINDS)
        kind = kinds[zlib.crc32(name.encode()) % len(kinds)] if self.kind == "mixed" else self.kind
        return KINDS[kind](shape[1])

    def packed_rows(self, name: str, start: int, stop: int) -> PackedRows:
        packing, (rows, dim) = self.packing(name), self.shapes[name]
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        low = 0 if packing.bits == 4 and packing.minimum else -(1 << packing.bits - 1)
        values = torch.randint(low, low + (1 << packing.bits), (rows, dim), generator=generator)
        groups, std = (rows, dim // packing.group), 1.5 / dim**0.5
        scale = torch.empty(groups).uniform_(0.5, 1.5, generator=generator)
        scale *= std / values.float().std()
        minimum = None
        if packing.minimum:
            minimum = torch.empty(groups).normal_(0, std, generator=generator)
            minimum = (minimum - scale * values.float().mean())[start:stop].to(packing.scale)
        return PackedRows(
            values[start:stop].to(torch.int8), scale[start:stop].to(packing.scale), minimum
        )

    def _read(self, name: str, out: Tensor) -> None:
        if self.packing(name) is None:
            return super()._read(name, out)
        values, scale, minimum = self.packed_rows(name, 0, len(out))
        group = out.shape[1] // scale.shape[1]
        for i in range(scale.shape[1]):
            columns = slice(i * group, (i + 1) * group)
            out[:, columns] = values[:, columns].float() * scale[:, i : i + 1].float()
            if minimum is not None:
                out[:, columns] += minimum[:, i : i + 1].float()
        return None
