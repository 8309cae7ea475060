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

STEP = 1 << 18  # values that are read at once, few enough for the CPU's cache
LOW = np.uint64(0x0F0F0F0F0F0F0F0F)  # the low halves of 8 bytes
FOUR = np.uint64(4)
Factors = tuple[np.ndarray, np.ndarray | None]  # scale and minimum :: [n, groups]


def read_blocks(kind: Type, rows: Tensor) -> PackedRows:
    """Returns the integers and scales of rows :: [rows, bytes], uint8. kind must be in FORMATS.

    Raises ValueError if a scale or minimum is not finite.
    """
    block, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = rows.numpy().reshape(-1, block_bytes)  # [n, block_bytes]
    packing, read = FORMATS[kind]
    factors = len(blocks), block // packing.group
    dtype = np.float16 if packing.scale == torch.float16 else np.float32
    values = np.empty((len(blocks), block), np.int8)
    scale = np.empty(factors, dtype)
    minimum = np.empty(factors, dtype) if packing.minimum else None
    step = STEP // block
    with np.errstate(invalid="ignore"):  # inf * 0 is NaN, which is refused below
        for i in range(0, len(blocks), step):
            part = slice(i, i + step)
            scale[part], found = read(blocks[part], values[part])
            if minimum is not None:
                minimum[part] = found
    _check_finite("scale", scale)
    if minimum is not None:
        _check_finite("minimum", minimum)
    shape = len(rows), -1
    return PackedRows(
        torch.from_numpy(values).view(shape),  # [rows, dim]
        torch.from_numpy(scale).view(shape),  # [rows, dim / group]
        None if minimum is None else torch.from_numpy(minimum).view(shape),
    )


def _check_finite(name: str, factors: np.ndarray) -> None:
    # Without their sign, the bits of finite numbers are less than those of infinity and NaN. This
    # is ten times as fast as isfinite.
    bits = factors.view(f"u{factors.itemsize}")
    infinity = np.array(np.inf, factors.dtype).view(bits.dtype)
    if (bits & np.iinfo(bits.dtype).max >> 1).max() >= infinity:
        wrong = factors[~np.isfinite(factors)][0]
        raise ValueError(f"a {name} is {wrong}, which is not finite")


def _columns(blocks: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Returns bytes `start` to `stop` - 1 of each block :: [n, stop - start], contiguous."""
    items = np.ascontiguousarray(_items(blocks, start, stop))
    return items.view(np.uint8).reshape(len(blocks), -1)


def _items(blocks: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Returns a view :: [n, 1] of `_columns`, whose items have all bytes of a block. numpy copies
    an item at once."""
    return blocks[:, start:stop].view(f"V{stop - start}")


def _fp16(blocks: np.ndarray, byte: int) -> np.ndarray:
    return _columns(blocks, byte, byte + 2).view(np.float16)  # [n, 1]


def _nibbles(data: np.ndarray, half: int) -> np.ndarray:
    """Returns the 4-bit values of data :: [n, bytes], in which `half` bytes have 2 * half
    neighboring values, the first half in the low bits: [n, 2 * bytes]."""
    eight = data.view(np.uint64)
    values = np.empty((data.size // half, 2), f"V{half}")
    values[:, 0] = (eight & LOW).view(values.dtype).reshape(-1)
    values[:, 1] = (eight >> FOUR & LOW).view(values.dtype).reshape(-1)
    return values.view(np.uint8).reshape(len(data), -1)


def _further_bits(data: np.ndarray, bits: int) -> np.ndarray:
    """Returns the `bits`-bit values of data :: [n, bytes], shifted left by 4. All lowest bits are
    the first values: [n, 8 / bits * bytes]."""
    parts = [data >> shift << 4 & ((1 << bits) - 1 << 4) for shift in range(0, 8, bits)]
    return np.concatenate(parts, axis=1)


def _bits_in_order(data: np.ndarray) -> np.ndarray:
    """Returns the bits of data :: [n, bytes], shifted left by 4: [n, 8 * bytes]."""
    bits = np.unpackbits(data.reshape(-1), bitorder="little").view(np.uint64)
    return (bits << FOUR).view(np.uint8).reshape(len(data), -1)


def _with_factors(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns scale and minimum of the groups of Q4_K or Q5_K: [n, 8], fp32."""
    low_scale, low_minimum, rest = (_columns(blocks, i, i + 4) for i in (4, 8, 12))  # [n, 4]
    scale = np.concatenate((low_scale & 63, rest & 15 | low_scale >> 2 & 48), axis=1)
    minimum = np.concatenate((low_minimum & 63, rest >> 4 | low_minimum >> 2 & 48), axis=1)
    scales, minimums = (_fp16(blocks, byte).astype(np.float32) for byte in (0, 2))
    return scales * scale, minimums * -minimum.astype(np.float32)


def _q4_0(blocks: np.ndarray, out: np.ndarray) -> Factors:
    values = _nibbles(_columns(blocks, 2, 18), 16).view(np.int8)
    np.subtract(values, 8, out=out)
    return _fp16(blocks, 0), None


def _q4_1(blocks: np.ndarray, out: np.ndarray) -> Factors:
    out[:] = _nibbles(_columns(blocks, 4, 20), 16)
    return _fp16(blocks, 0), _fp16(blocks, 2)


def _q5_0(blocks: np.ndarray, out: np.ndarray) -> Factors:
    values = _nibbles(_columns(blocks, 6, 22), 16)
    values |= _bits_in_order(_columns(blocks, 2, 6))
    np.subtract(values.view(np.int8), 16, out=out)
    return _fp16(blocks, 0), None


def _q5_1(blocks: np.ndarray, out: np.ndarray) -> Factors:
    values = _nibbles(_columns(blocks, 8, 24), 16)
    np.bitwise_or(values, _bits_in_order(_columns(blocks, 4, 8)), out=out.view(np.uint8))
    return _fp16(blocks, 0), _fp16(blocks, 2)


def _q8_0(blocks: np.ndarray, out: np.ndarray) -> Factors:
    out.view("V32")[:] = _items(blocks, 2, 34)
    return _fp16(blocks, 0), None


def _q4_k(blocks: np.ndarray, out: np.ndarray) -> Factors:
    out[:] = _nibbles(_columns(blocks, 16, 144), 32)
    return _with_factors(blocks)


def _q5_k(blocks: np.ndarray, out: np.ndarray) -> Factors:
    values = _nibbles(_columns(blocks, 48, 176), 32)
    high = _further_bits(_columns(blocks, 16, 48), 1)
    np.bitwise_or(values, high, out=out.view(np.uint8))
    return _with_factors(blocks)


def _q6_k(blocks: np.ndarray, out: np.ndarray) -> Factors:
    values = _nibbles(_columns(blocks, 0, 128), 64)
    high = _columns(blocks, 128, 192).reshape(-1, 32)  # [2 * n, 32]
    values |= _further_bits(high, 2).reshape(len(blocks), -1)
    np.subtract(values.view(np.int8), 32, out=out)
    factors = _columns(blocks, 192, 208).view(np.int8)
    return _fp16(blocks, 208).astype(np.float32) * factors, None  # [n, 16]


class Format(NamedTuple):
    packing: Packing
    # Writes the values of blocks :: [n, block_bytes], uint8, to out :: [n, block], int8.
    read: Callable[[np.ndarray, np.ndarray], Factors]


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
