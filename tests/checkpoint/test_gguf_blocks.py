"""Compares the integers and scales that are read from GGUF blocks with gguf's dequantization."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from gguf_blocks import FACTORS, random_blocks, random_bytes, set_factor
from torch import Tensor

from gemma_fast.checkpoint.gguf_blocks import FORMATS, read_blocks
from gemma_fast.kernels.packed import PackedRows, PackedWeight

KINDS = pytest.mark.parametrize("kind", list(FORMATS), ids=lambda kind: kind.name)
FINITE = np.array([0, -0.0, 1, -1, 65504, -65504, 6e-8, -6e-8, 6.1e-5, 0.1], np.float16)


def pack(rows: np.ndarray, kind: Type, scale: torch.dtype = torch.float32) -> PackedWeight:
    """Returns rows of blocks :: [rows, bytes] as a model with scales of this dtype stores them."""
    read = read_blocks(kind, torch.from_numpy(rows))
    weight = PackedWeight(read.values.shape, FORMATS[kind].packing._replace(scale=scale))
    weight.write(0, read)
    return weight


def expected(rows: np.ndarray, kind: Type) -> Tensor:
    return torch.from_numpy(dequantize(rows, kind))


def test_every_format_is_tested():
    assert FORMATS.keys() == FACTORS.keys()


@KINDS
def test_random_blocks_unpack_bit_for_bit_as_in_gguf(kind):
    rng = np.random.default_rng(0)
    rows = random_bytes((256, 1024), kind, rng)
    for i in range(len(FACTORS[kind])):
        blocks = 256, 1024 // GGML_QUANT_SIZES[kind][0]
        factors = rng.integers(0, 1 << 16, blocks, np.uint16).view(np.float16)
        set_factor(rows, kind, i, np.where(np.isfinite(factors), factors, np.float16(-0.0)))
    unpacked = pack(rows, kind).weight.unpack(torch.float32)
    assert torch.equal(unpacked, expected(rows, kind))
    assert unpacked.std() > 100, "the scales are not random"


@KINDS
@pytest.mark.parametrize("byte", [0, 0x0F, 0x3F, 0x7F, 0x80, 0xAA, 0xF0, 0xFF], ids=hex)
def test_blocks_of_equal_bytes_unpack_bit_for_bit_as_in_gguf(kind, byte):
    rows = np.full_like(random_bytes((len(FINITE) ** 2, 256), kind, np.random.default_rng(0)), byte)
    for i, factors in zip(range(len(FACTORS[kind])), np.meshgrid(FINITE, FINITE), strict=False):
        set_factor(rows, kind, i, factors.reshape(-1, 1))
    unpacked = pack(rows, kind).weight.unpack(torch.float32)
    assert torch.equal(unpacked, expected(rows, kind))


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if "K" not in kind.name], ids=str)
def test_weights_that_gguf_quantizes_unpack_bit_for_bit(kind):
    weight = torch.randn(64, 512) * torch.logspace(-6, 2, 64)[:, None]
    rows = quantize(weight.numpy(), kind)
    unpacked = pack(rows, kind).weight.unpack(torch.float32)
    assert torch.equal(unpacked, expected(rows, kind))
    assert (unpacked - weight).norm() < 0.15 * weight.norm()


@KINDS
def test_the_packing_says_what_is_read(kind):
    packing = FORMATS[kind].packing
    values, scale, minimum = read_blocks(
        kind, torch.from_numpy(random_blocks((512, 256), kind, 1.0))
    )
    assert values.dtype == torch.int8 and values.shape == (512, 256)
    assert scale.dtype == packing.scale and scale.shape == (512, 256 // packing.group)
    assert (minimum is not None) == packing.minimum
    if minimum is not None:
        assert minimum.dtype == scale.dtype and minimum.shape == scale.shape
    bits = {"4": 4, "5": 5, "6": 6, "8": 8}[kind.name[1]]
    lowest = 0 if packing.minimum else -(1 << bits - 1)
    assert (values.min(), values.max()) == (lowest, lowest + (1 << bits) - 1)


@KINDS
def test_with_scales_in_fp16_a_weight_is_within_one_rounding_of_scale_and_minimum(kind):
    """A rounding to fp16 changes a number by at most 2^-11 of it, and a subnormal by 2^-25."""
    rows = random_blocks((256, 1024), kind, std=0.02)
    exact: PackedRows = read_blocks(kind, torch.from_numpy(rows))
    unpacked = pack(rows, kind, torch.float16).weight.unpack(torch.float32)

    def rounding(x: Tensor) -> Tensor:  # [256, groups] → [256, 1024]
        bound = (x.float().abs() * 2**-11).clamp(min=2**-25)
        return bound.repeat_interleave(FORMATS[kind].packing.group, dim=1)

    bound = exact.values.abs() * rounding(exact.scale)
    if exact.minimum is not None:
        bound += rounding(exact.minimum)
    error = (unpacked - expected(rows, kind)).abs()
    if FORMATS[kind].packing.scale == torch.float16:
        assert not error.any()
    else:
        assert error.any()
        assert (error <= bound * (1 + 1e-5) + 1e-9).all()


@KINDS
@pytest.mark.parametrize("factor", [np.nan, np.inf, -np.inf])
def test_factors_that_are_not_finite_are_refused(kind, factor):
    for i, name in zip(range(len(FACTORS[kind])), ("scale", "minimum"), strict=False):
        rows = random_blocks((3, 512), kind, std=1.0)
        set_factor(rows[2:], kind, i, factor)
        # inf times a factor of 0 is NaN
        with pytest.raises(ValueError, match=rf"a {name} is -?(nan|inf), which is not finite"):
            read_blocks(kind, torch.from_numpy(rows))
