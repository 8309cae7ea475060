"""Compares rms_norm and add_rms_norm with fp64."""

import pytest
import torch
from kernel_checks import DTYPES, strided
from tolerances import assert_rounded, norm_roundings

from gemma_fast.kernels.rmsnorm import add_rms_norm, rms_norm

SHAPES = [(1, 640), (1, 1), (7, 48), (2, 3, 2048), (5, 1000), (0, 32)]


def oracle(x, weight, eps=1e-6):
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (1 + weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_equals_fp64(shape, dtype, device, poison_outputs):
    x = torch.randn(shape, device=device).to(dtype)
    weight = torch.randn(shape[-1], device=device).to(dtype)
    out = rms_norm(x, weight)
    assert out.dtype == dtype
    assert_rounded(out, oracle(x, weight), norm_roundings(shape[-1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm_equals_fp64(shape, dtype, device, poison_outputs):
    x, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(shape[-1], device=device).to(dtype)
    before = residual.clone()
    out, total = add_rms_norm(x, residual, weight)
    torch.testing.assert_close(total, x + before, rtol=0, atol=0)
    assert_rounded(out, oracle(total, weight), norm_roundings(shape[-1]))
    assert torch.equal(residual, before), "the caller's residual was overwritten"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm_with_post_norm_equals_fp64(shape, dtype, device, poison_outputs):
    x, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight, post_weight = (torch.randn(shape[-1], device=device).to(dtype) for _ in range(2))
    out, total = add_rms_norm(x, residual, weight, post_weight)
    post = oracle(x, post_weight)
    roundings = norm_roundings(shape[-1])
    assert_rounded(total, residual.double() + post, roundings, size=post.abs(), steps=1)
    assert_rounded(out, oracle(total, weight), roundings)


def test_post_norm_is_rounded_before_it_is_added(device):
    x, residual = torch.randn(2, 64, 512, device=device, dtype=torch.float16)
    weight = torch.randn(512, device=device)
    _, total = add_rms_norm(x, residual, weight, weight)
    rounded = residual + oracle(x, weight).half()
    once = (residual.double() + oracle(x, weight)).half()
    assert (total != rounded).float().mean() < 1e-3 < 1e-2 < (once != rounded).float().mean()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows_equal_fp64(dtype, device, poison_outputs):
    x = strided((6, 64), dtype, device)
    weight = torch.randn(64, device=device)
    assert_rounded(rms_norm(x, weight), oracle(x, weight), norm_roundings(64))
    for a, b in ((x, x), (x, x.contiguous()), (x.contiguous(), x)):
        out, _ = add_rms_norm(a, b, weight)
        assert_rounded(out, oracle(x + x, weight), norm_roundings(64))


def test_one_plus_weight_is_not_rounded(device):
    """1 + 15.8125 and 1 + 0.00390625 need more bits than bf16 has, so the sum must be in fp32."""
    weight = torch.tensor([15.8125, 0.00390625] * 16, dtype=torch.bfloat16, device=device)
    x = torch.randn(64, 32, device=device)
    exact, rounded = oracle(x, weight), oracle(x, (1 + weight).double() - 1)
    assert (exact - rounded).abs().max() > 1e-2
    assert_rounded(rms_norm(x, weight), exact, norm_roundings(32))


@pytest.mark.parametrize("large", [1e-20, 1e15], ids=str)
def test_extreme_values_equal_fp64(large, device):
    x = torch.full((2, 64), large, device=device)
    weight = torch.zeros(64, device=device)
    assert_rounded(rms_norm(x, weight), oracle(x, weight), norm_roundings(64))


@pytest.mark.parametrize("device", ["kernel"], indirect=True)
def test_weight_of_wrong_shape_raises(device):
    with pytest.raises(AssertionError, match=r"weight.*\(3,\).*\(2, 4\)"):
        rms_norm(torch.randn(2, 4, device=device), torch.randn(3, device=device))
