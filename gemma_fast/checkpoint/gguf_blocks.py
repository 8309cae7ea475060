"""Reads the integers and scales in the blocks of GGUF's quantized types, without dequantizing them.

A block has 32 or, in the types Q*_K, 256 neighboring weights of a row:

    type          bytes of a block, in this order
    Q4_0, Q4_1    scale, minimum (only Q4_1), 16 bytes of 4-bit values
    Q5_0, Q5_1    scale, minimum (only Q5_1), the values' 5th bits, 16 bytes of 4-bit values
    Q8_0          scale, 32 values
    Q4_K, Q5_K    scale, minimum, 12 bytes with 6-bit factors of the scale and of the minimum of
                  each group of 32 values, the values' 5th bits (only Q5_K), 4-bit values
    Q6_K          4-bit values, 2 further bits, 8-bit factors of each group of 16, scale

Scales and minimums are fp16. Products with their factors are exact in fp32. The values of Q4_0,
Q5_0 and Q6_K are stored with an offset of 8, 16 or 32.

This module is imported only when a GGUF file is opened, so that the package `gguf` stays optional.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gemma_fast.checkpoint.gguf_reader import GGML_QUANT_SIZES
from gemma_fast.checkpoint.gguf_reader import GGMLQuantizationType as Type
from gemma_fast.kernels.packed import PackedRows, Packing


def read_blocks(kind: Type, rows: Tensor) -> PackedRows:
    """Returns the integers and scales of rows :: [rows, bytes], uint8. kind must be in FORMATS.

    Raises ValueError if a scale or minimum is not finite.
    """
    block_bytes = GGML_QUANT_SIZES[kind][1]
    blocks = rows.unflatten(1, (-1, block_bytes))  # [rows, blocks, block_bytes]
    values, scale, minimum = FORMATS[kind].read(blocks)
    for name, factors in (("scale", scale), ("minimum", minimum)):
        # The sum of finite ones is finite, and ten times as fast as a test of each.
        if factors is not None and not factors.sum(dtype=torch.float32).isfinite():
            wrong = factors[~factors.isfinite()][0].item()
            raise ValueError(f"a {name} is {wrong}, which is not finite")
    return PackedRows(
        values.flatten(1).view(torch.int8),  # [rows, dim]
        scale.flatten(1),  # [rows, dim / group]
        None if minimum is None else minimum.flatten(1),  # [rows, dim / group]
    )


def _fp16(blocks: Tensor, byte: int) -> Tensor:
    return blocks[..., byte : byte + 2].contiguous().view(torch.float16)  # [rows, blocks, 1]


def _nibbles(data: Tensor, half: int) -> Tensor:
    """Returns the 4-bit values of data :: [..., n], in which `half` bytes have 2 * half neighboring
    values, the first half in the low bits: [..., 2 * n]."""
    data = data.contiguous().unflatten(-1, (-1, half))  # [..., n / half, half]
    return torch.stack((data & 15, data >> 4), dim=-2).flatten(-3)


def _further_bits(data: Tensor, bits: int) -> Tensor:
    """Returns the `bits`-bit values of data :: [..., n], shifted left by 4. All lowest bits are the
    first n values: [..., 8 / bits * n]."""
    parts = [(data >> shift << 4) & ((1 << bits) - 1 << 4) for shift in range(0, 8, bits)]
    return torch.cat(parts, dim=-1)


def _bits_in_order(data: Tensor) -> Tensor:
    """Returns the bits of data :: [..., n], shifted left by 4: [..., 8 * n]."""
    return torch.from_numpy(np.unpackbits(data.numpy(), axis=-1, bitorder="little")) << 4


def _with_factors(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Returns scale and minimum of the groups of Q4_K or Q5_K: [rows, blocks, 8], fp32."""
    low_scale, low_minimum, rest = blocks[..., 4:16].split(4, dim=-1)  # each [rows, blocks, 4]
    scale = torch.cat((low_scale & 63, rest & 15 | low_scale >> 2 & 48), dim=-1)
    minimum = torch.cat((low_minimum & 63, rest >> 4 | low_minimum >> 2 & 48), dim=-1)
    return _fp16(blocks, 0).float() * scale, _fp16(blocks, 2).float() * -minimum.float()


def _q4_0(blocks: Tensor) -> PackedRows:
    return PackedRows(_nibbles(blocks[..., 2:], 16) - 8, _fp16(blocks, 0), None)


def _q4_1(blocks: Tensor) -> PackedRows:
    return PackedRows(_nibbles(blocks[..., 4:], 16), _fp16(blocks, 0), _fp16(blocks, 2))


def _q5_0(blocks: Tensor) -> PackedRows:
    values = _nibbles(blocks[..., 6:], 16) | _bits_in_order(blocks[..., 2:6])
    return PackedRows(values - 16, _fp16(blocks, 0), None)


def _q5_1(blocks: Tensor) -> PackedRows:
    values = _nibbles(blocks[..., 8:], 16) | _bits_in_order(blocks[..., 4:8])
    return PackedRows(values, _fp16(blocks, 0), _fp16(blocks, 2))


def _q8_0(blocks: Tensor) -> PackedRows:
    return PackedRows(blocks[..., 2:].contiguous(), _fp16(blocks, 0), None)


def _q4_k(blocks: Tensor) -> PackedRows:
    return PackedRows(_nibbles(blocks[..., 16:], 32), *_with_factors(blocks))


def _q5_k(blocks: Tensor) -> PackedRows:
    values = _nibbles(blocks[..., 48:], 32) | _further_bits(blocks[..., 16:48], 1)
    return PackedRows(values, *_with_factors(blocks))


def _q6_k(blocks: Tensor) -> PackedRows:
    low, high, factors = blocks[..., :208].split((128, 64, 16), dim=-1)
    high = _further_bits(high.unflatten(-1, (2, 32)), 2).flatten(-2)  # [rows, blocks, 256]
    scale = _fp16(blocks, 208).float() * factors.view(torch.int8)  # [rows, blocks, 16]
    return PackedRows((_nibbles(low, 64) | high) - 32, scale, None)


class Format(NamedTuple):
    packing: Packing
    read: Callable[[Tensor], PackedRows]  # [rows, blocks, block_bytes] → tensors [rows, blocks, n]


# Types that stay packed.
FORMATS = {
    Type.Q4_0: Format(Packing(4, 32, False, torch.float16), _q4_0),
    Type.Q4_1: Format(Packing(4, 32, True, torch.float16), _q4_1),
    Type.Q5_0: Format(Packing(8, 32, False, torch.float16), _q5_0),
    Type.Q5_1: Format(Packing(8, 32, True, torch.float16), _q5_1),
    Type.Q8_0: Format(Packing(8, 32, False, torch.float16), _q8_0),
    Type.Q4_K: Format(Packing(4, 32, True, torch.float32), _q4_k),
    Type.Q5_K: Format(Packing(8, 32, True, torch.float32), _q5_k),
    Type.Q6_K: Format(Packing(8, 16, False, torch.float32), _q6_k),
}
