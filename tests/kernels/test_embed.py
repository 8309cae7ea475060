"""Compares embed with PyTorch's lookup and multiplication."""

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DTYPES

from gemma_fast.kernels.embed import embed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 640, 2304], ids="dim {}".format)
def test_embed_equals_pytorch(dim, dtype, device, poison_outputs):
    weight = torch.randn(50, dim, device=device).to(dtype)
    ids = torch.tensor([[0, 49, 7], [7, 7, 12]], device=device)
    out = embed(ids, weight, dim**0.5)
    # Gemma rounds the factor to the dtype: sqrt(640) = 25.298 becomes 25.25 in bf16.
    expected = F.embedding(ids, weight) * torch.tensor(dim**0.5, dtype=dtype, device=device)
    assert out.dtype == dtype and torch.equal(out, expected)


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
