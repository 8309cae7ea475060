"""Compares the router alone (`route`) with fp64."""

import pytest
import torch
from kernel_checks import DTYPES
from tolerances import assert_rounded, norm_roundings

from gemma_fast.kernels.router import route

# (rows, dim, experts, top_k): one program or several, the last one not full; dim past a block.
SHAPES = [(1, 48, 6, 3), (17, 72, 6, 3), (5, 200, 128, 8), (3, 64, 16, 16), (0, 48, 6, 3)]
EPS = 1e-2  # large enough to change results


def inputs(shape, dtype, device):
    rows, dim, experts, _ = shape
    h, proj = torch.randn(rows, dim, device=device), torch.randn(experts, dim, device=device)
    scale = 1 + 0.5 * torch.randn(dim, device=device)
    per_expert = 1 + 0.5 * torch.rand(experts, device=device)
    return (3 * h).to(dtype), scale.to(dtype), (proj * 2).to(dtype), per_expert.to(dtype)


def exact(h, scale, proj, per_expert, top_k):
    """Returns (p, chosen, weight) in fp64."""
    h, scale, proj, per_expert = (x.double() for x in (h, scale, proj, per_expert))
    h = h / (h.square().mean(-1, keepdim=True) + EPS).sqrt()
    p = (h * scale * h.shape[-1] ** -0.5 @ proj.T).softmax(-1)
    weight, chosen = p.topk(top_k)
    return p, chosen, weight / weight.sum(-1, keepdim=True) * per_expert[chosen]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_route_equals_fp64(shape, dtype, device, poison_outputs):
    given, top_k = inputs(shape, dtype, device), shape[-1]
    p, chosen, weight = exact(*given, top_k)
    found = route(*given, top_k=top_k, eps=EPS)
    assert [x.dtype for x in found] == [torch.float32, torch.int32, torch.float32]
    assert torch.equal(found[1].long(), chosen)
    # An error of a logit is a relative error of p, and logits are up to 8.
    roundings = 64 * (norm_roundings(shape[1]) + shape[1]) + shape[2] + 12
    assert_rounded(found[0], p, roundings)
    assert_rounded(found[2], weight, roundings)


@pytest.mark.parametrize("shape", [(2, 3, 48), (2, 1, 48), (48,)], ids=str)
def test_results_have_the_dimensions_of_the_input(shape, device):
    h, *weights = inputs((6, 48, 6, 3), torch.float32, device)
    h = h.flatten()[: torch.Size(shape).numel()].view(shape)
    found = route(h.transpose(0, -2) if h.ndim == 3 else h, *weights, top_k=3, eps=EPS)
    expected = exact(h.transpose(0, -2) if h.ndim == 3 else h, *weights, 3)
    for x, right in zip(found, expected, strict=True):
        assert x.shape == right.shape and x.is_contiguous()
        torch.testing.assert_close(x.double(), right.double(), rtol=1e-4, atol=0)


def test_of_equal_probabilities_the_lower_index_is_chosen(device):
    """Rows of zeros give equal logits for every order of summation."""
    h, scale, proj, per_expert = inputs((5, 48, 6, 3), torch.float32, device)
    proj.zero_()
    p, chosen, weight = route(h, scale, proj, per_expert, top_k=3, eps=EPS)
    assert torch.equal(chosen.cpu(), torch.tensor([[0, 1, 2]] * 5, dtype=torch.int32))
    torch.testing.assert_close(p, torch.full_like(p, 1 / 6))
    torch.testing.assert_close(weight, (per_expert[:3] / 3).expand_as(weight))


def test_nan_of_one_row_stays_there(device):
    h, *weights = inputs((5, 48, 6, 3), torch.float32, device)
    h[2, 7] = torch.nan
    p, chosen, weight = route(h, *weights, top_k=3, eps=EPS)
    assert chosen.min() >= 0 and chosen.max() < 6
    for x in (p, weight):
        assert x[2].isnan().all() and not x[[0, 1, 3, 4]].isnan().any()
