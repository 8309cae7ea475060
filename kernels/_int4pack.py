"""The layout in which PyTorch's CPU kernel for 4-bit weights reads them, also for 8-bit weights.

    weight = scale * value + zero     value: a nibble - 8

data   :: uint8 [out, columns / 2], in blocks of 64 rows (with AVX512; with AVX2 of 32):
          [block][column][32 bytes]; byte j has row j in its low half, row j + 32 in its high half
scales :: bf16 [columns / group, blocks, rows of a block, 2]: scale and zero of a row's group of 32,
          64, 128 or 256. Their shape says which processor has packed the data

An 8-bit value is two nibbles, high and low: value = 16 * (high - 8) + (low - 8). A chunk of 16, 32,
64 or 128 columns with one scale becomes a group of twice as many: high nibbles, then low nibbles.
The matmul's x is 16 * x for the high ones and x for the low ones, which multiplies zero by 17.
Such data have dtype int8, so data have the shape and dtype of the plain layout (packed.py).
"""

import functools
import math

import torch
from torch import Tensor

BLOCK_ROWS = {"AVX512": 64, "AVX2": 32}  # torch.backends.cpu.get_cpu_capability() → rows
Plain = tuple[Tensor, Tensor, Tensor]  # int8 values, scale and minimum of rows, as in packed.py


@functools.cache
def block_rows() -> int | None:
    """Returns the rows of a block on this processor. None: PyTorch has no kernel for it, or one
    with another layout."""
    rows = BLOCK_ROWS.get(torch.backends.cpu.get_cpu_capability())
    if rows is None:
        return None
    with torch.device("cpu"):  # the caller may have another default
        nibbles = torch.arange(128 * 32).view(128, 32) * 2654435761 >> 16 & 15
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles.int(), 1)
    except (AttributeError, RuntimeError):
        return None
    blocks = interleave(nibbles.to(torch.uint8), 4, 32, rows)
    return rows if torch.equal(packed.flatten(), blocks.flatten()) else None


def chunk_of(bits: int, group: int) -> int:
    """Returns the number of columns that share a scale in this layout, for groups of the weight."""
    return math.gcd(group, 256 if bits == 4 else 128)


def interleave(values: Tensor, bits: int, chunk: int, block: int) -> Tensor:
    """Returns the bytes [blocks, columns, block / 2] of unsigned values :: uint8 [rows, dim]."""
    # [blocks, block / 2, dim]
    low, high = values.view(-1, 2, block // 2, values.shape[1]).unbind(1)
    if bits == 4:
        return (low | high << 4).transpose(1, 2)  # [blocks, dim, block / 2]
    nibbles = low >> 4 | high & 240, low & 15 | high << 4  # high ones of both rows, then low ones
    chunks = torch.stack([x.unflatten(2, (-1, chunk)) for x in nibbles], dim=3)
    return chunks.flatten(2).transpose(1, 2)  # [blocks, dim / chunk * 2 * chunk, block / 2]


def rows_of(data: Tensor, scales: Tensor, bits: int, start: int, stop: int) -> Plain:
    """Returns rows `start` to `stop` - 1."""
    block, scales = scales.shape[2], scales.flatten(1, 2)  # [groups, out, 2]
    first, last = start // block, -(-stop // block)  # blocks
    blocks = _blocks(data, block)[first:last]  # [blocks, columns, block / 2]
    if bits == 4:
        halves = blocks & 15, blocks >> 4  # [blocks, dim, block / 2]
    else:
        # [blocks, dim / chunk, chunk, block / 2]
        high, low = blocks.unflatten(1, (len(scales), 2, -1)).unbind(2)
        halves = (high << 4 | low & 15).flatten(1, 2), (high & 240 | low >> 4).flatten(1, 2)
    values = torch.stack(halves, dim=1).transpose(2, 3)  # [blocks, 2, block / 2, dim]
    values = values.reshape((last - first) * block, -1)
    return _plain(values[start - first * block :][: stop - start], scales[:, start:stop], bits)


def take(data: Tensor, scales: Tensor, bits: int, index: Tensor) -> Plain:
    """Returns the rows in index :: [rows]."""
    block, scales = scales.shape[2], scales.flatten(1, 2)  # [groups, out, 2]
    row, half = index % (block // 2), index // (block // 2) % 2
    nibbles = _blocks(data, block)[index // block, :, row]  # [rows, columns]
    nibbles = nibbles >> (4 * half.to(torch.uint8))[:, None] & 15
    if bits == 8:
        # [rows, dim / chunk, chunk]
        high, low = nibbles.unflatten(1, (len(scales), 2, -1)).unbind(2)
        nibbles = (high << 4 | low).flatten(1)  # [rows, dim]
    return _plain(nibbles, scales[:, index], bits)


def _blocks(data: Tensor, block: int) -> Tensor:
    return data.view(torch.uint8).view(len(data) // block, -1, block // 2)


def _plain(values: Tensor, scales: Tensor, bits: int) -> Plain:
    scale, zero = scales.float().transpose(0, 1).unbind(2)  # [rows, groups]
    if bits == 4:
        return values.view(torch.int8) - 8, scale, zero
    return values.view(torch.int8) ^ -128, scale, 17 * zero - 8 * scale
