"""Weights in 8 or 4 bits: groups of integers with a scale, and a minimum where the format has one.

    weight[o, i] = scale[o, i // group] * value[o, i] + minimum[o, i // group]

value    8 bits: -128 … 127. 4 bits: -8 … 7 without a minimum, 0 … 15 with one
group    columns that share a scale: with 8 bits a multiple of 16, with 4 bits of 32; divides dim

The data of a row are its values in order. With 4 bits, 16 bytes have 32 columns: byte j has column
j in its low half and column j + 16 in its high half, and without a minimum each half is value + 8.
So a thread's load of 16 bytes has the values of neighboring columns of one group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COLUMNS = {8: 16, 4: 32}  # columns in 16 bytes of data; a group is a multiple of it


class Packing(NamedTuple):
    """How a weight is packed."""

    bits: int  # 8 or 4
    group: int  # columns that share a scale
    minimum: bool  # whether each group has a minimum
    scale: torch.dtype  # of scale and minimum: float16, bfloat16 or float32


class PackedRows(NamedTuple):
    """Some rows of a weight, before they are packed."""

    values: Tensor  # [rows, dim], int8
    scale: Tensor  # [rows, dim / group]
    minimum: Tensor | None  # [rows, dim / group]


class Weight(NamedTuple):
    """A weight as ops get it, packed or not. Kernels get it as one argument."""

    data: Any  # [out, dim] | packed: int8 [out, dim] or uint8 [out, dim / 2]
    scale: Any = None  # [out, dim / group] | None: not packed
    minimum: Any = None  # [out, dim / group] | None

    @property
    def bits(self) -> int:
        """8 or 4; only if the weight is packed."""
        return 8 if self.data.dtype == torch.int8 else 4

    @property
    def shape(self) -> tuple[int, int]:
        out, columns = self.data.shape
        return out, columns * 2 if self.scale is not None and self.bits == 4 else columns

    @property
    def group(self) -> int:
        """Columns that share a scale; 0 if the weight is not packed."""
        if self.scale is None:
            return 0
        return self.shape[1] // self.scale.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self if x is not None)

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight :: [out, dim], computed in fp32 and rounded once."""
        if self.scale is None:
            return self.data.to(dtype)
        weight = self.values().float().view(*self.scale.shape, self.group)
        weight *= self.scale.float().unsqueeze(-1)  # [out, dim / group, group]
        if self.minimum is not None:
            weight += self.minimum.float().unsqueeze(-1)
        return weight.view(self.shape).to(dtype)

    def values(self) -> Tensor:
        """Returns the integers :: [out, dim], int8."""
        if self.bits == 8:
            return self.data
        data = self.data.unflatten(1, (-1, 1, 16))  # [out, dim / 32, 1, 16]
        halves = torch.cat((data & 15, data >> 4), dim=2)  # [out, dim / 32, 2, 16]
        values = halves.view(self.shape).to(torch.int8)
        return values if self.minimum is not None else values - 8

    def rows(self, start: int, stop: int) -> Weight:
        return Weight(*(None if x is None else x[start:stop] for x in self))

    def one_of(self, count: int, index: int) -> Weight:
        """Returns the weight at `index` of the `count` weights that are stacked in this one."""
        rows = self.data.shape[0] // count
        return self.rows(index * rows, (index + 1) * rows)


def take_rows(weight: Weight, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the weight's rows :: [*index.shape, dim]."""
    if weight.scale is None:
        return F.embedding(index, weight.data).to(dtype)
    rows = Weight(*(None if x is None else x[index.flatten()] for x in weight))
    return rows.unpack(dtype).view(*index.shape, -1)


class PackedWeight(nn.Module):
    """A packed weight of a model. Ops take it in place of a tensor [out, dim].

    Converting the model to another dtype leaves it as it is. Raises ValueError for a packing that
    does not fit the shape.
    """

    minimum: Tensor | None

    def __init__(self, shape: Sequence[int], packing: Packing) -> None:
        super().__init__()
        out, dim = shape
        check_packing(dim, packing)
        self.packing, groups = packing, dim // packing.group
        data = torch.empty(out, dim * packing.bits // 8, dtype=DATA[packing.bits])
        self.data = nn.Parameter(data, requires_grad=False)
        self.scale = nn.Parameter(torch.empty(out, groups, dtype=packing.scale), False)
        minimum = torch.empty(out, groups, dtype=packing.scale) if packing.minimum else None
        self.minimum = None if minimum is None else nn.Parameter(minimum, requires_grad=False)

    @property
    def weight(self) -> Weight:
        return Weight(self.data, self.scale, self.minimum)

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.weight.shape)

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def numel(self) -> int:
        return self.shape.numel()

    @torch.no_grad()
    def write(self, start: int, rows: PackedRows) -> None:
        """Packs rows from row `start` on.

        Their group may be larger than this weight's, they may have 4 bits where this weight has 8,
        and no minimum where this weight has one. Raises ValueError if a scale does not fit the
        packing's dtype. A scale below 6e-5 has fewer digits in float16: its error is up to 3e-8.
        """
        packing, (values, scale, minimum) = self.packing, rows
        stop, groups = start + len(values), self.scale.shape[1]
        assert values.shape[1] == self.shape[1] and groups % scale.shape[1] == 0, f"{scale.shape=}"
        assert packing.minimum or minimum is None, "this weight has no minimum"
        if packing.minimum and minimum is None:
            shift = 8 if packing.bits == 4 else 0
            values, minimum = values + shift, scale * -shift
        self._write_factors(self.scale[start:stop], scale)
        if self.minimum is not None and minimum is not None:
            self._write_factors(self.minimum[start:stop], minimum)
        if packing.bits == 4:
            nibbles = (values if packing.minimum else values + 8).view(torch.uint8)
            assert not nibbles.numel() or nibbles.max() < 16, "a value does not fit in 4 bits"
            low, high = nibbles.unflatten(1, (-1, 2, 16)).unbind(2)  # [rows, dim / 32, 16]
            values = (low | high << 4).flatten(1)  # [rows, dim / 2]
        self.data[start:stop] = values

    def _write_factors(self, rows: Tensor, factors: Tensor) -> None:
        """Writes the factors in the packing's dtype, for each of this weight's groups."""
        narrow = factors.to(self.packing.scale)
        # The least and the largest number are NaN if there is one. isfinite takes more time.
        if narrow.numel() and not all(x.isfinite() for x in narrow.aminmax()):
            name = str(self.packing.scale).removeprefix("torch.")
            raise ValueError(
                f"a scale of {factors.abs().max().item():.3g} does not fit {name}: load the model"
                " with quantize='none'"
            )
        spread = rows.unflatten(1, (factors.shape[1], -1))  # [rows, factors, groups of each]
        spread.copy_(narrow.unsqueeze(2))

    def _apply(self, fn: Any, recurse: bool = True) -> PackedWeight:
        for name, x in self.named_parameters(recurse=False):
            new = fn(x.data)
            if new.dtype != x.dtype:  # fn converts the model to another dtype
                new = x.data.to(new.device)
            setattr(self, name, nn.Parameter(new, requires_grad=False))
        return self


DATA = {8: torch.int8, 4: torch.uint8}
SCALES = torch.float16, torch.bfloat16, torch.float32


def check_packing(dim: int, packing: Packing) -> None:
    """Raises ValueError if a weight with rows of dim columns cannot be packed in this way."""
    if packing.bits not in COLUMNS:
        raise ValueError(f"weights of {packing.bits} bits are not supported, only 8 and 4")
    if packing.scale not in SCALES:
        raise ValueError(f"scales in {packing.scale} are not supported, only {SCALES}")
    if packing.group % COLUMNS[packing.bits] or packing.group < 1 or dim % packing.group:
        raise ValueError(
            f"groups of {packing.group} columns must divide the row's {dim} columns, and be a"
            f" multiple of {COLUMNS[packing.bits]}"
        )


def common_packing(packings: Sequence[Packing]) -> Packing:
    """Returns the smallest packing that holds weights of all these packings."""
    dtypes = {packing.scale for packing in packings}
    group = math.gcd(*(packing.group for packing in packings))
    bits = max(packing.bits for packing in packings)
    return Packing(
        bits=8 if group % COLUMNS[bits] else bits,
        group=group,
        minimum=any(packing.minimum for packing in packings),
        scale=dtypes.pop() if len(dtypes) == 1 else torch.float32,
    )
