"""Compares rms_norm, add_norm and add_rms_norm with fp64."""

from contextlib import nullcontext

import pytest
import torch
from kernel_checks import DTYPES, strided
from tolerances import assert_rounded, norm_roundings

from gemma_fast.kernels.rmsnorm import add_norm, add_rms_norm, rms_norm

SHAPES = [(1, 640), (1, 1), (7, 48), (2, 3, 2048), (5, 1000), (0, 32)]


def oracle(x, weight, eps=1e-6, offset=1.0):
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (offset + weight)


def check(out, x, weight, offset=1.0):
    assert out.dtype == x.dtype
    assert_rounded(out, oracle(x, weight, offset=offset), norm_roundings(x.shape[-1]))


def check_stream(h, x, residual, post_weight, offset, layer_scalar=None, residual_weight=None):
    """Checks h = layer_scalar * (residual + rms_norm(x, post_weight)), or with residual_weight
    h = rms_norm(residual, residual_weight) + rms_norm(x, post_weight)."""
    assert h.dtype == x.dtype
    post = oracle(x, post_weight, offset=offset)
    exact, steps = residual.double() + post, 1
    if residual_weight is not None:
        both = oracle(residual, residual_weight, offset=offset)
        post, exact, steps = post.abs() + both.abs(), both + post, 2
    if layer_scalar is not None:
        post, exact, steps = post * layer_scalar.double(), exact * layer_scalar.double(), 2
    assert_rounded(h, exact, norm_roundings(x.shape[-1]), size=post.abs(), steps=steps)


# Each function returns the result of an rms_norm with one mistake.
MISTAKES = {
    "weight without 1 +": lambda x, weight: oracle(x, weight - 1),
    "1 + weight rounded to bf16": lambda x, weight: oracle(x, (1 + weight).bfloat16() - 1.0),
    "epsilon of Llama": lambda x, weight: oracle(x, weight, eps=1e-5),
    "divided by dim - 1": lambda x, weight: oracle(x, weight) * (1 - 1 / x.shape[-1]) ** 0.5,
    "rounded before it is scaled": lambda x, weight: oracle(x, 0 * weight).half() * (1.0 + weight),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_check_detects_a_mistake(mistake):
    dtype = torch.float16 if "rounded before" in mistake else torch.float32
    for shape in SHAPES[2:5]:
        x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1])
        check(oracle(x, weight).to(dtype), x, weight)
        with pytest.raises(AssertionError, match="times its bound"):
            check(MISTAKES[mistake](x, weight).to(dtype), x, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_equals_fp64(shape, dtype, device, poison_outputs):
    x = torch.randn(shape, device=device).to(dtype)
    weight = torch.randn(shape[-1], device=device).to(dtype)
    check(rms_norm(x, weight), x, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms_without_offset_or_weight_equal_fp64(shape, dtype, device, poison_outputs):
    x = torch.randn(shape, device=device).to(dtype)
    weight = torch.randn(shape[-1], device=device).to(dtype)
    check(rms_norm(x, weight, offset=0.0), x, weight, offset=0.0)
    for offset in (0.0, 1.0):  # has no effect if there is no weight
        check(rms_norm(x, None, offset=offset), x, torch.ones_like(weight), offset=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm_equals_fp64(shape, dtype, device, poison_outputs):
    x, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(shape[-1], device=device).to(dtype)
    before = residual.clone()
    out, total = add_rms_norm(x, residual, weight)
    torch.testing.assert_close(total, x + before, rtol=0, atol=0)
    check(out, total, weight)
    assert torch.equal(residual, before), "the caller's residual was overwritten"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [1.0, 0.0], ids="offset {}".format)
def test_post_norm_and_layer_scalar_equal_fp64(offset, shape, dtype, device, poison_outputs):
    x, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight, post_weight = (torch.randn(shape[-1], device=device).to(dtype) for _ in range(2))
    check_stream(
        add_norm(x, residual, post_weight, offset=offset), x, residual, post_weight, offset
    )
    for scalar in (None, torch.tensor([0.37], device=device).to(dtype)):
        out, h = add_rms_norm(
            x, residual, weight, post_weight, offset=offset, layer_scalar=scalar
        )  # fmt: skip
        check_stream(h, x, residual, post_weight, offset, scalar)
        check(out, h, weight, offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [1.0, 0.0], ids="offset {}".format)
def test_sum_of_two_norms_equals_fp64(offset, shape, dtype, device, poison_outputs):
    x, residual = (3 * torch.randn(shape, device=device).to(dtype) for _ in range(2))
    post_weight, weight = (torch.randn(shape[-1], device=device).to(dtype) for _ in range(2))
    h = add_norm(x, residual, post_weight, offset=offset, residual_weight=weight, pdl=True)
    check_stream(h, x, residual, post_weight, offset, residual_weight=weight)


@pytest.mark.parametrize("mistake", ["not normalized", "weights swapped", "inputs swapped"])
def test_check_of_two_norms_detects_a_mistake(mistake, device):
    x, residual = torch.randn(2, 4, 640, device=device)
    post_weight, weight = torch.randn(2, 640, device=device)
    given = x, residual, post_weight, weight
    wrong = {
        "not normalized": (x, residual, post_weight, None),
        "weights swapped": (x, residual, weight, post_weight),
        "inputs swapped": (residual, x, post_weight, weight),
    }[mistake]
    for (a, b, of_a, of_b), held in ((given, True), (wrong, False)):
        h = add_norm(a, b, of_a, offset=0.0, residual_weight=of_b)
        expectation = nullcontext() if held else pytest.raises(AssertionError, match="its bound")
        with expectation:
            check_stream(h, x, residual, post_weight, 0.0, residual_weight=weight)


def test_both_norms_are_rounded_before_they_are_added(device):
    x, residual = torch.randn(2, 64, 512, device=device, dtype=torch.float16)
    post_weight, weight = torch.randn(2, 512, device=device)
    h = add_norm(x, residual, post_weight, residual_weight=weight)
    rounded = oracle(x, post_weight).half() + oracle(residual, weight).half()
    once = (oracle(x, post_weight) + oracle(residual, weight)).half()
    assert (h != rounded).float().mean() < 1e-3 < 1e-2 < (once != h).float().mean()


def test_post_norm_is_rounded_before_it_is_added(device):
    x, residual = torch.randn(2, 64, 512, device=device, dtype=torch.float16)
    weight = torch.randn(512, device=device)
    _, total = add_rms_norm(x, residual, weight, weight)
    rounded = residual + oracle(x, weight).half()
    once = (residual.double() + oracle(x, weight)).half()
    assert (total != rounded).float().mean() < 1e-3 < 1e-2 < (once != rounded).float().mean()
    assert torch.equal(add_norm(x, residual, weight), total)
    scalar = torch.tensor([0.37], device=device).half()
    _, scaled = add_rms_norm(x, residual, weight, weight, layer_scalar=scalar)
    assert torch.equal(scaled, total * scalar), "h is rounded before it is scaled, and again after"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows_equal_fp64(dtype, device, poison_outputs):
    x = strided((6, 64), dtype, device)
    weight = torch.randn(64, device=device)
    h = add_norm(x, x, weight, residual_weight=weight + 1)
    check_stream(h, x, x, weight, 1.0, residual_weight=weight + 1)
    check(rms_norm(x, weight), x, weight)
    for a, b in ((x, x), (x, x.contiguous()), (x.contiguous(), x)):
        out, _ = add_rms_norm(a, b, weight)
        check(out, x + x, weight)
        check_stream(add_norm(a, b, weight), a, b, weight, 1.0)


def test_one_plus_weight_is_not_rounded(device):
    """1 + 15.8125 and 1 + 0.00390625 need more bits than bf16 has, so the sum must be in fp32."""
    weight = torch.tensor([15.8125, 0.00390625] * 16, dtype=torch.bfloat16, device=device)
    x = torch.randn(64, 32, device=device)
    exact, rounded = oracle(x, weight), oracle(x, (1 + weight).double() - 1)
    assert (exact - rounded).abs().max() > 1e-2
    check(rms_norm(x, weight), x, weight)


@pytest.mark.parametrize("large", [1e-20, 1e15], ids=str)
def test_extreme_values_equal_fp64(large, device):
    x = torch.full((2, 64), large, device=device)
    weight = torch.zeros(64, device=device)
    check(rms_norm(x, weight), x, weight)


@pytest.mark.parametrize("device", ["kernel"], indirect=True)
def test_weight_of_wrong_shape_raises(device):
    with pytest.raises(AssertionError, match=r"weight.*\(3,\).*\(2, 4\)"):
        rms_norm(torch.randn(2, 4, device=device), torch.randn(3, device=device))
