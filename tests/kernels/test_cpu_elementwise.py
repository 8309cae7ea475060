"""Compares norms, GeGLU, rotary_write and unpacking on a CPU, in all dtypes, with fp64."""

import pytest
import torch
from c_kernels import BUILDS, built_for, needs_c
from cpu_tensors import DIMS, DTYPES, same_bits, threads, unaligned
from kernel_checks import strided
from oracles import angles, geglu_oracle, normed, normed_and_rotated
from packed_weights import PACKINGS, packed_weight
from tolerances import (
    GEGLU_ROUNDINGS,
    assert_rounded,
    geglu_size,
    norm_roundings,
    pair_size,
)

from gemma_fast.kernels.cpu import calls
from gemma_fast.kernels.geglu import geglu
from gemma_fast.kernels.rmsnorm import add_norm, add_rms_norm, rms_norm
from gemma_fast.kernels.rotary import rotary_write

pytestmark = needs_c
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
DIM = pytest.mark.parametrize("dim", DIMS, ids="dim {}".format)
OFFSET = pytest.mark.parametrize("offset", [0.0, 1.0], ids="offset {}".format)


@pytest.fixture(params=BUILDS)
def build(request):
    with built_for(request.param):
        yield


def check_norm(y, x, weight, offset=1.0):
    assert y.dtype == x.dtype
    assert_rounded(y, normed(x, weight, offset), norm_roundings(x.shape[-1]))


def check_stream(h, x, residual, post_weight, offset, scalar=None):
    post, steps = x.double(), 0
    if post_weight is not None:
        post, steps = normed(x, post_weight, offset), 1
    exact = residual.double() + post
    if scalar is not None:
        post, exact, steps = post * scalar.double(), exact * scalar.double(), steps + 1
    assert_rounded(h, exact, norm_roundings(x.shape[-1]), size=post.abs(), steps=steps)


@DTYPE
@DIM
@OFFSET
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_norms_equal_fp64(weight_dtype, offset, dim, dtype, build, poison_outputs):
    x, residual = torch.randn(2, 5, dim).to(dtype)
    weight, post_weight = torch.randn(2, dim).to(weight_dtype)
    check_norm(rms_norm(x, weight, offset=offset), x, weight, offset)
    check_norm(rms_norm(x, None, offset=offset), x, None)
    h = add_norm(x, residual, post_weight, offset=offset)
    check_stream(h, x, residual, post_weight, offset)
    for post in (None, post_weight):
        for scalar in (None, torch.tensor([0.37]).to(dtype)):
            y, h = add_rms_norm(x, residual, weight, post, offset=offset, layer_scalar=scalar)
            check_stream(h, x, residual, post, offset, scalar)
            check_norm(y, h, weight, offset)


@DTYPE
def test_steps_of_a_norm_are_rounded_as_separate_ops(dtype, build):
    """The post-norm, h, and h times the scalar are rounded. (In fp32, the compiler may fuse.)"""
    x, residual = torch.randn(2, 64, 512).to(dtype)
    weight, scalar = torch.randn(512), torch.tensor([0.37]).to(dtype)
    _, h = add_rms_norm(x, residual, weight, weight, layer_scalar=scalar)
    expected = (residual + rms_norm(x, weight)) * scalar
    limit = 0.0 if dtype != torch.float32 else 1e-6
    torch.testing.assert_close(h, expected, rtol=limit, atol=limit)


@DTYPE
def test_layouts_of_norms(dtype, build, poison_outputs):
    rows, weight = strided((3, 5, 37), dtype, "cpu"), torch.randn(74)[::2]
    columns = torch.randn(37, 6).to(dtype).T
    one_row = torch.randn(37).to(dtype)
    for x in (rows, columns, one_row, unaligned(rows), rows[:0], rows.expand(2, 3, 5, 37)):
        check_norm(rms_norm(x, weight), x, weight)
        y, h = add_rms_norm(x, unaligned(x), unaligned(weight))
        assert y.is_contiguous() and h.is_contiguous()
        check_stream(h, x, x, None, 1.0)
        check_norm(y, h, weight)


def test_extreme_rows_of_norms(build):
    """A row of zeros, one whose squares are small, one whose squares are large, NaN, inf."""
    x = torch.randn(6, 37) * torch.tensor([0, 1e-15, 1e15, 1, 1, 1])[:, None]
    x[3, 5], x[4, 36] = float("nan"), float("inf")
    y = rms_norm(x, torch.zeros(37))
    assert y[3].isnan().all() and y[4, 36].isnan() and (y[4, :36] == 0).all()
    check_norm(y[[0, 1, 2, 5]], x[[0, 1, 2, 5]], torch.zeros(37))


@DTYPE
def test_nan_of_all_bits_stays_nan(dtype, build):
    """Its bits would overflow if they were rounded as those of numbers."""
    for bits in (-1, 0x7FFFFFFF):
        weight = torch.full((37,), bits, dtype=torch.int32).view(torch.float32)
        for offset in (0.0, 1.0):
            assert rms_norm(torch.ones(2, 37, dtype=dtype), weight, offset=offset).isnan().all()


@pytest.mark.parametrize("wrong", ["weight", "residual", "dtype"])
def test_tensors_that_do_not_fit_are_refused(wrong):
    """They would be read past their ends."""
    x, weight = torch.randn(4, 8), torch.randn(8)
    other = {"weight": x, "residual": x[:3], "dtype": x.half()}[wrong]
    short = weight[:7] if wrong == "weight" else weight
    with pytest.raises(AssertionError):
        add_rms_norm(x, other, short)
    with pytest.raises(AssertionError):
        add_norm(x, other, short)
    if wrong == "weight":
        with pytest.raises(AssertionError):
            rms_norm(x, short)


@DTYPE
@pytest.mark.parametrize("dim", [*DIMS, 511, 512, 1536], ids="dim {}".format)
def test_geglu_equals_fp64(dim, dtype, build, poison_outputs):
    gate_up = (3 * torch.randn(3, 2 * dim)).to(dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    pairs = [(gate, up), (unaligned(gate), up), (gate[0], up[0]), (gate[:0], up[:0])]
    pairs.append((strided((2, 3, dim), dtype, "cpu"), torch.randn(3, 2, dim).to(dtype).mT.mT))
    pairs[-1] = pairs[-1][0], torch.randn(3, 2, dim).to(dtype).transpose(0, 1)
    for gate, up in pairs:
        y, both = geglu(gate, up), torch.cat((gate, up), -1)
        assert y.dtype == dtype and y.is_contiguous()
        assert_rounded(y, geglu_oracle(both), GEGLU_ROUNDINGS, geglu_size(both))


@DTYPE
def test_extreme_gates(dtype, build):
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([60, -60, 300, -300, 0, nan, 1, inf, -1e4, 1e4]).to(dtype)
    up = torch.tensor([2, 3, -2, 2, 5, 1, nan, 2, 2, 2]).to(dtype)
    y = geglu(gate, up).tolist()
    assert y[:5] == [120, 0, -600, 0, 0] or max(map(abs, (y[1], y[3]))) < 1e-30
    assert y[5] != y[5] and y[6] != y[6] and y[7] == inf and abs(y[8]) < 1e-30
    assert y[9] == torch.tensor(2e4).to(dtype)


@DTYPE
@OFFSET
@pytest.mark.parametrize("d", [6, 32, 37 * 2, 256], ids="d {}".format)
@pytest.mark.parametrize("slots", [9, 13, 5], ids="slots {}".format)  # more, fewer than tokens
def test_rotary_write_equals_fp64(slots, d, offset, dtype, build):
    b, t, n = 3, 9, 2
    qkv = torch.randn(b, t, 3 * n, d).to(dtype)
    k, v = qkv[:, :, n : 2 * n], qkv[:, :, 2 * n :]
    start = torch.tensor([0, 7, -4], dtype=torch.int32)
    weight = torch.randn(d, dtype=torch.float32 if offset else dtype)
    for norm_weight, v_norm in ((None, False), (weight, False), (weight, True)):
        ring = torch.full((2, b, n, slots, d), float("nan"), dtype=dtype)
        keys, values = ring.transpose(2, 3).contiguous().transpose(2, 3)  # strided heads
        options = norm_weight, 1e-6, offset, v_norm
        rotary_write(k, v, keys, values, *angles(start, t, d), start, *options)
        for row, first in enumerate(start.tolist()):
            kept = torch.arange(max(t - slots, 0, -first), t)
            positions = first + kept
            exact = normed_and_rotated(k[row, kept], positions, norm_weight, offset)
            found = keys[row, :, positions % slots].transpose(0, 1)  # [kept, n, d]
            assert_rounded(found, exact, norm_roundings(d) + 8, pair_size(exact))
            exact = normed(v[row, kept]) if v_norm else v[row, kept]
            found = values[row, :, positions % slots].transpose(0, 1)
            assert_rounded(found, exact, norm_roundings(d) if v_norm else 0)
        assert keys[0, :, t:].isnan().all(), "a slot that belongs to no token was written"


@pytest.mark.parametrize("layout", ["k", "v", "ring", "cos, sin", "start"])
def test_rotary_write_reads_strided_tensors(layout):
    k, v = torch.randn(2, 2, 9, 3, 32)
    ring, start = torch.zeros(2, 2, 3, 13, 32), torch.tensor([0, 7], dtype=torch.int32)
    cos, sin = angles(start, 9)
    expected = ring.clone()
    rotary_write(k, v, *expected, cos, sin, start)
    apart = lambda x: torch.stack((x, x), -1)[..., 0]  # noqa: E731
    k, v = (apart(x) if name == layout else x for name, x in (("k", k), ("v", v)))
    ring = apart(ring) if layout == "ring" else ring
    cos, sin = (apart(x) if layout == "cos, sin" else x for x in (cos, sin))
    rotary_write(k, v, *ring, cos, sin, apart(start) if layout == "start" else start)
    torch.testing.assert_close(ring, expected, rtol=1e-5, atol=1e-6)


@DTYPE
@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_unpacked_rows_are_rounded_once(packing, dtype, build, poison_outputs):
    weight, exact = packed_weight(11, 192, packing)
    for start, stop in ((0, 11), (3, 4), (5, 11)):
        found = calls.unpack(weight.weight, start, stop, torch.empty(8 * 11 * 192, dtype=dtype))
        rows = exact[start:stop]
        assert_rounded(found, rows, 1, size=2 * rows.abs().amax() if packing.minimum else 0)


@DTYPE
def test_results_do_not_depend_on_the_number_of_threads(dtype, build):
    """Enough elements for several threads."""
    x, up = torch.randn(2, 67, 1031).to(dtype)
    k, start = torch.randn(2, 67, 8, 64).to(dtype), torch.tensor([0, 5], dtype=torch.int32)
    packed, found = packed_weight(300, 192, PACKINGS["int4, group 32, minimum"])[0].weight, []
    for count in (1, 2, 3):
        ring = torch.zeros(2, 2, 8, 50, 64, dtype=dtype)
        with threads(count):
            rotary_write(k, k, *ring, *angles(start, 67, 64), start, torch.ones(64))
            unpacked = calls.unpack(packed, 0, 300, torch.empty(300 * 192, dtype=dtype))
            results = *add_rms_norm(x, up, up[0], x[0]), geglu(x, up), unpacked
        found.append(torch.cat([y.flatten() for y in (*results, ring)]))
    assert same_bits(*found)
