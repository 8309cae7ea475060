"""Compares linear, norm_linear and next_token of few rows on a CPU, in all dtypes, with fp64."""

import itertools

import pytest
import torch
from c_kernels import BUILDS, built_for, needs_c
from cpu_tensors import DIMS, DTYPES, same_bits, threads, unaligned
from kernel_checks import chosen, strided
from matvec_checks import (
    EPS,
    GEMMA_4,
    check_linear,
    check_norm_linear,
    gemma_4_inputs,
    packed_weight_of,
    weight_of,
)

from gemma_fast.kernels import matvec
from gemma_fast.kernels.cpu import calls
from gemma_fast.kernels.lm_head import next_token
from gemma_fast.kernels.matvec import linear, norm_linear
from gemma_fast.kernels.packed import PackedWeight, Packing, Weight
from gemma_fast.kernels.rmsnorm import rms_norm

pytestmark = needs_c
ROWS = [1, 2, 3, 4, 5, 7, 8, 16]
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Groups of a few units of 16 bytes, some with loops of constant length, and one group per row.
PACKINGS = [
    Packing(bits, group, minimum, scale)
    for bits, group, minimum, scale in itertools.product(
        (8, 4), (16, 32, 64, 96, 128, 1152), (False, True), DTYPES
    )
    if bits == 8 or group != 16
]
INT8, INT4 = Packing(8, 32, False, torch.half), Packing(4, 32, True, torch.half)


@pytest.fixture(params=BUILDS)
def build(request):
    with built_for(request.param):
        yield


@pytest.fixture
def only_c(monkeypatch):
    """Lets only the C kernel compute matmuls."""
    for name in ("torch_linear", "packed_linear", "_launch"):
        monkeypatch.setattr(matvec, name, None)


@DTYPE
@pytest.mark.parametrize("rows", ROWS, ids="rows {}".format)
@pytest.mark.parametrize("dim", DIMS, ids="dim {}".format)
def test_linear_equals_fp64(dim, rows, dtype, build, only_c, poison_outputs):
    for out in (1, 13):
        x, weight = torch.randn(rows, dim).to(dtype), weight_of(out, dim, dtype, "cpu")
        check_linear(linear(x, weight), x, weight)


@DTYPE
@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: "-".join(map(str, packing)))
def test_packed_linear_equals_fp64(packing, dtype, build, only_c, poison_outputs):
    """Weights are not rounded to x's dtype."""
    dim = 1152 if packing.group in (96, 1152) else 640
    weight, exact, size = packed_weight_of(13, dim, packing, "cpu")
    for rows in ROWS:
        x = torch.randn(rows, dim).to(dtype)
        check_linear(linear(x, weight), x, exact, size)


@DTYPE
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stream", ["x alone", "residual", "residual, post-norm"])
@pytest.mark.parametrize("kind", [None, INT8, INT4], ids=["not packed", "int8", "int4, minimum"])
def test_norm_linear_equals_fp64(kind, stream, weight_dtype, dtype, build, only_c, poison_outputs):
    """38 rows of the weight: with geglu, 19 of gate and 19 of up."""
    for dim, rows in itertools.product((640, 32, 2053), (1, 3, 16)):
        x, residual = 3 * torch.randn(2, rows, dim).to(dtype)
        norm_weight, post_weight = torch.randn(2, dim).to(weight_dtype)
        residual = residual if "residual" in stream else None
        given = x, residual, norm_weight, post_weight if "post-norm" in stream else None
        size = None
        if kind is None:
            weight = exact = weight_of(38, dim, dtype, "cpu")
        elif dim % 32:
            continue
        else:
            weight, exact, size = packed_weight_of(38, dim, kind, "cpu")
        for geglu, offset in ((False, 1.0), (True, 0.0)):
            found = norm_linear(*given, weight, geglu=geglu, offset=offset, eps=EPS)
            check_norm_linear(found, *given, exact, geglu, offset=offset, size=size)


@DTYPE
@pytest.mark.parametrize("offset", [0.0, 1.0], ids="offset {}".format)
@pytest.mark.parametrize("case", GEMMA_4)
def test_norm_linear_of_gemma_4_equals_fp64(case, offset, dtype, build, only_c, poison_outputs):
    for dim, rows in itertools.product((640, 37), (1, 5)):
        given, options = gemma_4_inputs(rows, dim, 30, case, dtype)
        found = norm_linear(*given, **options, offset=offset, eps=EPS)
        check_norm_linear(found, *given, **options, offset=offset)


@DTYPE
@pytest.mark.parametrize("kind", [None, INT8, INT4], ids=["not packed", "int8", "int4, minimum"])
def test_more_rows_are_computed_by_a_library(kind, dtype, poison_outputs):
    x, size, steps = torch.randn(65, 640).to(dtype), None, 0
    weight = exact = weight_of(13, 640, dtype, "cpu")
    if kind is not None:
        (weight, exact, size), steps = packed_weight_of(13, 640, kind, "cpu"), 1
    check_linear(linear(x, weight), x, exact, size, steps)


@pytest.mark.parametrize("kind", [None, INT8, INT4], ids=["not packed", "int8", "int4, minimum"])
@DTYPE
def test_results_do_not_depend_on_the_number_of_threads(dtype, kind, build, only_c):
    """700 rows of 1056 columns are several chunks, the last of which is not full."""
    weight = weight_of(700, 1056, dtype, "cpu")
    if kind is not None:
        weight = packed_weight_of(700, 1056, kind, "cpu")[0]
    for rows in (1, 5):
        x, residual = torch.randn(2, rows, 1056).to(dtype)
        norms, found = torch.randn(2, 1056), []
        for count in (1, 2, 3):
            with threads(count):
                results = norm_linear(x, residual, *norms, weight, geglu=True)
                found.append(torch.cat([*results, linear(x, weight)], dim=-1))
        assert same_bits(*found)


@DTYPE
def test_layouts_of_x_and_up(dtype, build, only_c, poison_outputs):
    weight, norm_weight = weight_of(13, 37, dtype, "cpu"), torch.randn(37)
    for x in (strided((2, 3, 37), dtype, "cpu"), torch.randn(37, 5).to(dtype).T):
        check_linear(linear(x, weight), x, weight)
        up = strided((*x.shape[:-1], 13), dtype, "cpu")
        for other in (up, unaligned(up)):
            found = norm_linear(x, x, None, norm_weight, weight, up=other, eps=EPS)
            flat = [y.flatten(0, -2) for y in (*found, x, x, up)]
            check_norm_linear(flat[:2], *flat[2:4], None, norm_weight, weight, up=flat[4])
    assert linear(torch.randn(37).to(dtype), weight).shape == (13,)


@DTYPE
def test_unaligned_tensors_give_the_result_of_aligned_ones(dtype, build, only_c):
    x, residual = torch.randn(2, 3, 96).to(dtype)
    norms, weight = torch.randn(2, 96), weight_of(14, 96, dtype, "cpu")
    packed = packed_weight_of(14, 96, INT4, "cpu")[0].weight
    names = "weight_scale", "weight_minimum"
    for data, factors in ((weight, {}), (packed.data, dict(zip(names, packed[1:], strict=True)))):
        expected = norm_linear(x, residual, *norms, data, **factors, geglu=True)
        given = map(unaligned, (x, residual, *norms, data))
        found = norm_linear(*given, **{k: unaligned(v) for k, v in factors.items()}, geglu=True)
        assert all(map(torch.equal, found, expected))


def test_a_strided_weight_is_not_read_as_a_contiguous_one():
    x, weight = torch.randn(2, 37), torch.randn(37, 13)
    check_linear(linear(x, weight.T), x, weight.T)


def test_weights_and_rows_may_be_empty():
    weight = torch.randn(6, 8)
    assert linear(torch.randn(2, 8), weight[:0]).shape == (2, 0)
    y, h = norm_linear(torch.randn(0, 8), None, weight[0], None, weight, geglu=True)
    assert linear(torch.randn(0, 8), weight).shape == (0, 6)
    assert y.shape == (0, 3) and h.shape == (0, 8)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "int8"])
def test_weights_of_another_dtype_are_refused(dtype):
    x, weight = torch.randn(2, 8), torch.randn(6, 8)
    with pytest.raises(AssertionError, match=f"torch.float32, weight torch.{dtype}"):
        linear(x, weight.to(getattr(torch, dtype)))


def test_tensors_on_another_device_are_refused():
    x, weight = torch.randn(2, 8), torch.randn(6, 8)
    with pytest.raises(AssertionError, match="a tensor is on meta, and others are on a CPU"):
        calls.matvec(x, Weight(weight), norm_weight=torch.empty(8, device="meta"))


@pytest.mark.parametrize("rows", [1, 5], ids="rows {}".format)
@DTYPE
def test_nan_and_inf_are_computed_as_by_pytorch(dtype, rows, build, only_c):
    """In a row of x, in a row of the weight, and where their product is 0 * inf."""
    x, weight = torch.randn(rows, 40).to(dtype), weight_of(9, 40, dtype, "cpu")
    x[0, 3], weight[2, 39], weight[4, 0], weight[6, 5] = float("nan"), *3 * [float("inf")]
    x[-1, 5] = 0 if rows > 1 else 1
    found, exact = linear(x, weight), (x.double() @ weight.double().T).to(dtype)
    assert torch.equal(found.isnan(), exact.isnan()) and torch.equal(found.isinf(), exact.isinf())
    large = torch.full((rows, 40), torch.finfo(dtype).max).to(dtype)
    assert linear(large, large[:1]).isinf().all()


@pytest.mark.parametrize("softcap", [None, 2.0], ids="cap {}".format)
@pytest.mark.parametrize("kind", [None, INT8, INT4], ids=["not packed", "int8", "int4, minimum"])
@DTYPE
def test_next_token_is_that_of_fp64(dtype, kind, softcap, build):
    weight = exact = weight_of(499, 640, dtype, "cpu")
    if kind is not None:
        weight, exact, _ = packed_weight_of(499, 640, kind, "cpu")
    for b in (1, 3):
        given = *torch.randn(2, b, 640).to(dtype), *torch.randn(2, 640) / 4, weight
        found = chosen(next_token, *given, b=b, device="cpu", softcap=softcap)
        normed = rms_norm(norm_linear(*given)[1], given[2])
        assert torch.equal(found, (normed.double() @ exact.double().T).argmax(-1))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_logits_of_next_token_are_not_rounded_to_16_bits(dtype, build):
    """Rows 100 and 300 of the weight differ in the last digit of one column. If both logits were
    rounded, they would be equal, and the first would be the next token."""
    x, weight = torch.rand(2, 640).to(dtype) + 0.5, torch.zeros(499, 640, dtype=dtype)
    weight[100] = weight[300] = 1
    weight[300, 5] += torch.finfo(dtype).eps
    given = x, None, torch.zeros(640), None, weight
    assert chosen(next_token, *given, b=2, device="cpu").tolist() == [300, 300]
    rounded = norm_linear(*given)[0]
    assert torch.equal(rounded[:, 100], rounded[:, 300])


@DTYPE
def test_c_is_called_up_to_the_largest_number_of_rows(dtype, monkeypatch):
    ran = []
    monkeypatch.setattr(calls, "matvec", lambda x, *_, **__: ran.append(x) or (x, x))
    for packed, weight in enumerate((torch.randn(4, 32, dtype=dtype), PackedWeight((4, 32), INT8))):
        most = calls.MAX_ROWS[dtype][packed]
        for shape in ((1, 1), (1, most), (2, most // 2), (1, most + 1), (3, most // 2), (1, 0)):
            linear(torch.randn(*shape, 32, dtype=dtype), weight)
    assert len(ran) == 6
