"""Compares embed with PyTorch's lookup and multiplication."""

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DTYPES
from packed_weights import PACKINGS, packed_weight
from tolerances import assert_rounded

from gemma_fast.kernels.embed import embed
from gemma_fast.kernels.packed import Packing


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 640, 2304], ids="dim {}".format)
def test_embed_equals_pytorch(dim, dtype, device, poison_outputs):
    weight = torch.randn(50, dim, device=device).to(dtype)
    ids = torch.tensor([[0, 49, 7], [7, 7, 12]], device=device)
    out = embed(ids, weight, dim**0.5)
    # Gemma rounds the factor to the dtype: sqrt(640) = 25.298 becomes 25.25 in bf16.
    expected = F.embedding(ids, weight) * torch.tensor(dim**0.5, dtype=dtype, device=device)
    assert out.dtype == dtype and torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_packed_rows_equal_fp64(packing, dtype, device, poison_outputs):
    weight, elements = packed_weight(11, 192, packing, device)
    ids = torch.tensor([[0, 10, 7], [7, -1, 3]], device=device)
    out = embed(ids, weight, 192**0.5, dtype=dtype)
    factor = torch.tensor(192**0.5, dtype=dtype).double()
    # In fp32: scale * value, plus the minimum. Then the row is rounded to dtype.
    size = elements.abs().max()
    assert out.dtype == dtype
    assert_rounded(out, elements[ids.clamp(min=0)] * factor, 2, size * factor, steps=1)


@pytest.mark.parametrize("dim", [32, 1120, 2048], ids="dim {}".format)
@pytest.mark.parametrize("bits", [8, 4])
def test_packed_rows_of_other_sizes_equal_unpacked_rows(dim, bits, device, poison_outputs):
    weight, _ = packed_weight(5, dim, Packing(bits, 32, True, torch.float16), device)
    ids = torch.tensor([[4, 0]], device=device)
    out = embed(ids, weight, 2.0, dtype=torch.float32)
    torch.testing.assert_close(out, 2 * weight.weight.unpack(torch.float32)[ids], rtol=0, atol=1e-6)


def test_packed_rows_are_rounded_to_the_dtype_before_they_are_scaled(device):
    """As rows of the unpacked table are."""
    weight, _ = packed_weight(4, 64, PACKINGS["int4, group 32"], device)
    ids = torch.tensor([[3, 1]], device=device)
    out = embed(ids, weight, 1.7, dtype=torch.float16)
    rows = weight.weight.unpack(torch.float16)[ids]
    assert torch.equal(out, rows * torch.tensor(1.7, dtype=torch.float16, device=device))


def test_strided_ids_give_a_contiguous_result(device, poison_outputs):
    weight = torch.randn(30, 40, device=device)
    ids = torch.randint(30, (6, 8), device=device).T[::2]
    out = embed(ids, weight, 2.0)
    assert out.is_contiguous() and torch.equal(out, 2 * weight[ids])


def test_token_minus_one_reads_row_0(device):
    weight = torch.randn(4, 8, device=device)
    out = embed(torch.tensor([[-1, 2]], device=device), weight, 1.0)
    assert torch.equal(out, weight[None, [0, 2]])


def test_no_tokens_give_an_empty_result(device):
    ids = torch.zeros(2, 0, dtype=torch.int64, device=device)
    assert embed(ids, torch.randn(4, 8, device=device), 1.0).shape == (2, 0, 8)
