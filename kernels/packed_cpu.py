"""Matmul with a packed weight on a CPU, through PyTorch's kernel for 4-bit weights.

    y = x @ weightᵀ

x      :: [..., dim], bf16; in another dtype the weight is unpacked
weight :: a CPUPackedWeight's; _int4pack.py describes its layout. That of another processor, from a
          pickled model, is unpacked
y      :: [..., out], x.dtype

Sums are in fp32. Scales and zeros are rounded to bf16, so a weight differs from the file's by at
most 2^-8 of the largest weight of its group. (Unpacking to bf16 rounds each weight by 2^-9.)
Bound by memory: bytes = weight.nbytes.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gemma_fast.kernels._int4pack import block_rows, chunk_of, interleave
from gemma_fast.kernels._triton import knobs
from gemma_fast.kernels.packed import PackedRows, PackedWeight, Packing, Weight

MAX_ROWS = 32  # with more rows, unpacking the weight and PyTorch's matmul take less time
LARGEST = 119  # of the values -136 … 119 that two digits of -8 … 7 have


class CPUPackedWeight(PackedWeight):
    """A packed weight in the layout of _int4pack.py. It stays on the CPU. A group of more than 256
    columns (8 bits: 128) is stored as several.

    Raises ValueError when it is moved to a GPU.
    """

    @staticmethod
    def supports(rows: Sequence[int]) -> bool:
        """Whether this processor has the kernel, for a weight that stacks tensors of these rows."""
        block = block_rows()
        return (
            block is not None and all(n % block == 0 for n in rows) and not knobs.runtime.interpret
        )

    def __init__(self, shape: Sequence[int], packing: Packing) -> None:
        (out, dim), group = shape, chunk_of(packing.bits, packing.group)
        super().__init__(shape, Packing(packing.bits, group, False, torch.bfloat16))
        rows = block_rows()
        assert rows, "this processor has no kernel"
        scale = torch.empty(dim // group, out // rows, rows, 2, dtype=torch.bfloat16)
        self.scale = nn.Parameter(scale, requires_grad=False)

    @torch.no_grad()
    def write(self, start: int, rows: PackedRows) -> None:
        """As in PackedWeight. `start` and the number of rows must be multiples of a block's."""
        (bits, group, _, _), (values, scale, minimum) = self.packing, rows
        stop, block = start + len(values), block_rows()
        assert values.shape[1] == self.shape[1] and group * scale.shape[1] <= values.shape[1]
        assert block and start % block == 0 == stop % block, f"{start=}, {stop=}, {block=}"
        repeats = values.shape[1] // group // scale.shape[1]
        chunks = values.unflatten(1, (-1, group))  # [rows, groups, group]
        shift = torch.zeros(chunks.shape[:2], dtype=torch.int8)
        if minimum is None:
            shift += 8 * (chunks.amax(2) <= LARGEST)  # then zero is 0, which bf16 has exactly
        zero = (8 - shift) * scale.float().repeat_interleave(repeats, dim=1)  # [rows, groups]
        if minimum is not None:
            zero += minimum.float().repeat_interleave(repeats, dim=1)
        if bits == 8:
            zero /= 17
        unsigned = (chunks + shift.unsqueeze(2)).flatten(1)  # [rows, dim]
        if bits == 8:
            unsigned ^= -128
        else:
            assert not (unsigned >> 4).any(), "a value does not fit in 4 bits"
        scales = self.scale.flatten(1, 2)  # [groups, out, 2], a view
        scales[:, start:stop, 0] = self._narrowed(scale).T
        scales[:, start:stop, 1] = self._narrowed(zero).T
        data = interleave(unsigned.view(torch.uint8), bits, group, block)
        self.data[start:stop] = data.reshape(len(values), -1).view(self.data.dtype)

    def check_move(self, fn: Any) -> None:
        if fn(self.data[:0]).is_cuda:
            raise ValueError(
                "packed weights that were loaded on a CPU cannot be moved to a GPU, which needs"
                " another layout: load the model again with device='cuda'"
            )


def runs_int4pack(x: Tensor, weight: Weight) -> bool:
    """Whether `int4pack_linear` can compute x @ weightᵀ, and takes less time than unpacking."""
    few = 0 < x.numel() <= MAX_ROWS * x.shape[-1]
    if not (few and x.dtype == torch.bfloat16 and weight.is_int4pack):
        return False
    return weight.scale.shape[2] == block_rows()  # not a model that another processor has packed


def int4pack_linear(x: Tensor, weight: Weight) -> Tensor:
    """Returns x @ weightᵀ."""
    rows, groups = x.reshape(-1, x.shape[-1]).contiguous(), len(weight.scale)  # [rows, dim]
    if weight.bits == 8:
        chunks = rows.view(len(rows), groups, 1, -1)  # [rows, groups, 1, chunk]
        rows = (chunks * _digit_values()).flatten(1)  # [rows, groups * 2 * chunk]
    data, group = weight.data.view(torch.uint8), rows.shape[1] // groups
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, data, group, weight.scale.flatten(1, 2))
    return y.view(*x.shape[:-1], -1)


@functools.cache
def _digit_values() -> Tensor:
    return torch.tensor([[16.0], [1.0]], dtype=torch.bfloat16, device="cpu")
