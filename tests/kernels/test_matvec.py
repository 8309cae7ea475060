"""Compares linear and norm_linear with fp64."""

import pytest
import torch
import torch.nn.functional as F
from c_kernels import without_c
from kernel_checks import DTYPES, strided, tf32
from marks import slow
from matvec_checks import (
    EPS,
    GEMMA_4,
    check_linear,
    check_norm_linear,
    gemma_4_inputs,
    weight_of,
)
from triton import knobs

from gemma_fast.kernels import matvec
from gemma_fast.kernels._skinny import MAX_ROWS
from gemma_fast.kernels.matvec import linear, norm_linear
from gemma_fast.kernels.packed import Weight
from gemma_fast.kernels.rmsnorm import add_rms_norm, rms_norm

# (dim, out). dim is less than a block, several blocks, or not a multiple of a block. In the last
# two shapes, the size of 16-bit rows is not a multiple of 16 bytes.
SHAPES = [(48, 88), (640, 40), (1160, 30), (2304, 20), (20, 34), (36, 6)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, MAX_ROWS, MAX_ROWS + 1], ids="rows {}".format)
@pytest.mark.parametrize(("dim", "out"), SHAPES, ids=str)
def test_linear_equals_fp64(dim, out, rows, dtype, device, poison_outputs):
    x, weight = torch.randn(rows, dim, device=device).to(dtype), weight_of(out, dim, dtype, device)
    check_linear(linear(x, weight), x, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geglu", [False, True], ids=["plain", "geglu"])
@pytest.mark.parametrize("stream", ["x alone", "residual", "residual, post-norm"])
@pytest.mark.parametrize("rows", [1, 3, MAX_ROWS + 1], ids="rows {}".format)
@pytest.mark.parametrize(("dim", "out"), SHAPES[::2], ids=str)
def test_norm_linear_equals_fp64(dim, out, rows, stream, geglu, dtype, device, poison_outputs):
    x = 3 * torch.randn(rows, dim, device=device).to(dtype)
    residual = torch.randn(rows, dim, device=device).to(dtype) if "residual" in stream else None
    post_weight = torch.randn(dim, device=device).to(dtype) if "post-norm" in stream else None
    norm_weight, weight = torch.randn(dim, device=device), weight_of(out, dim, dtype, device)
    given = x, residual, norm_weight, post_weight, weight
    check_norm_linear(norm_linear(*given, geglu=geglu, eps=EPS), *given, geglu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, *slow(1.0)], ids="offset {}".format)
@pytest.mark.parametrize("case", GEMMA_4)
@pytest.mark.parametrize("rows", [1, 3, MAX_ROWS + 1], ids="rows {}".format)
@pytest.mark.parametrize(("dim", "out"), [(1160, 30), (256, 40), *slow((36, 6))], ids=str)
def test_norm_linear_of_gemma_4_equals_fp64(
    dim, out, rows, case, offset, dtype, device, poison_outputs
):
    given, options = gemma_4_inputs(rows, dim, out, case, dtype, device)
    found = norm_linear(*given, **options, offset=offset, eps=EPS)
    check_norm_linear(found, *given, **options, offset=offset)


@pytest.mark.parametrize("mistake", ["1 + weight", "post-norm left out", "unscaled", "not gated"])
def test_check_of_norm_linear_detects_a_mistake_of_gemma_4(mistake):
    given, options = gemma_4_inputs(4, 640, 30, "up")
    changed, wrong = given, dict(options)
    if mistake == "post-norm left out":
        changed = (*given[:3], None, given[4])
    elif mistake != "1 + weight":
        del wrong["up" if mistake == "not gated" else "layer_scalar"]
    found = norm_linear(*changed, **wrong, eps=EPS, offset=float(mistake == "1 + weight"))
    check_norm_linear(
        norm_linear(*given, **options, eps=EPS, offset=0.0), *given, **options, offset=0.0
    )
    with pytest.raises(AssertionError, match="times its bound"):
        check_norm_linear(found, *given, **options, offset=0.0)


@pytest.mark.parametrize("mistake", ["TF32", "a column left out", "16 bits"])
@pytest.mark.parametrize(("dim", "out"), SHAPES, ids=str)
def test_check_of_linear_detects_a_mistake(dim, out, mistake):
    x, weight = torch.randn(3, dim), weight_of(out, dim, torch.float32, "cpu")
    wrong = {
        "TF32": lambda: linear(tf32(x), tf32(weight)),
        "a column left out": lambda: linear(x[:, 1:], weight[:, 1:]),
        "16 bits": lambda: linear(x, weight).half().float(),
    }
    check_linear(linear(x, weight), x, weight)
    with pytest.raises(AssertionError, match="times its bound"):
        check_linear(wrong[mistake](), x, weight)


@pytest.mark.parametrize("geglu", [False, True], ids=["plain", "geglu"])
@pytest.mark.parametrize("mistake", ["epsilon", "no 1 +", "no 1 + in the post-norm", "TF32"])
def test_check_of_norm_linear_detects_a_mistake(mistake, geglu):
    x, residual, norm_weight, post_weight = torch.randn(4, 1160)
    weight = weight_of(30, 1160, torch.float32, "cpu")
    given = x[None], residual[None], norm_weight, post_weight, weight
    check_norm_linear(norm_linear(*given, geglu=geglu, eps=EPS), *given, geglu)
    eps = 1.01 * EPS if mistake == "epsilon" else EPS
    changed = {
        "no 1 +": (*given[:2], norm_weight - 1, *given[3:]),
        "no 1 + in the post-norm": (*given[:3], post_weight - 1, weight),
        "TF32": (*given[:4], tf32(weight)),
    }.get(mistake, given)
    with pytest.raises(AssertionError, match="times its bound"):
        check_norm_linear(norm_linear(*changed, geglu=geglu, eps=eps), *given, geglu)


def test_check_of_norm_linear_detects_gelu_by_erf(monkeypatch):
    given = torch.randn(3, 48), None, torch.randn(48), None, weight_of(88, 48, torch.float32, "cpu")
    monkeypatch.setattr(matvec, "geglu_of", lambda gate, up: F.gelu(gate) * up)
    with without_c(), pytest.raises(AssertionError, match="times its bound"):
        check_norm_linear(norm_linear(*given, geglu=True, eps=EPS), *given, True)


def test_residual_is_rounded_as_in_add_rms_norm(device):
    """Both ops round the post-norm to fp16, add the residual, and round the sum to fp16."""
    x, residual = torch.randn(2, 5, 640, device=device).half()
    post_weight, weight = torch.randn(640, device=device), weight_of(16, 640, torch.half, device)
    _, expected = add_rms_norm(x, residual, post_weight, post_weight)
    _, h = norm_linear(x, residual, post_weight, post_weight, weight)
    assert (h != expected).float().mean() < 1e-3  # a sum in another order may round differently


@pytest.mark.parametrize("rows", [1, 6], ids="rows {}".format)
def test_the_scaled_residual_is_rounded_as_in_add_rms_norm(rows, device):
    """Both ops round the sum to fp16 before they multiply it by the scalar."""
    x, residual = torch.randn(2, rows, 640, device=device).half()
    post_weight, weight = torch.randn(640, device=device), weight_of(16, 640, torch.half, device)
    scalar = torch.tensor([0.37], device=device).half()
    given = x, residual, post_weight, post_weight
    _, expected = add_rms_norm(*given, layer_scalar=scalar)
    _, h = norm_linear(*given, weight, layer_scalar=scalar)
    assert (h != expected).float().mean() < 2e-3
    _, unscaled = norm_linear(*given, weight)
    assert torch.equal(h, unscaled * scalar)


@pytest.mark.parametrize("rows", [1, 6], ids="rows {}".format)
def test_the_normalized_row_is_rounded_once_as_in_rms_norm(rows, device):
    """With an identity weight, y is the normalized row. If the row were also rounded before it is
    multiplied by the norm weight, a quarter of y would differ from rms_norm."""
    x, norm_weight = torch.randn(rows, 256, device=device).half(), torch.randn(256, device=device)
    y, h = norm_linear(x, x, norm_weight, None, torch.eye(256, device=device).half())
    assert (y != rms_norm(h, norm_weight)).float().mean() < 5e-3


def test_linear_and_norm_linear_read_batched_strided_rows(device, poison_outputs):
    x, weight = strided((2, 3, 64), torch.float32, device), torch.randn(6, 64, device=device)
    check_linear(linear(x, weight), x, weight)
    y, h = norm_linear(x, x, torch.zeros(64, device=device), None, weight)
    assert y.shape == (2, 3, 6) and torch.equal(h, x + x)
    post_weight, per_layer = torch.randn(64, device=device), torch.randn(2, 3, 5, 6, device=device)
    for up in per_layer.unbind(2):
        y, h = norm_linear(x, x, None, post_weight, weight, up=up, eps=EPS)
        flat = (z.flatten(0, 1) for z in (y, h, x, x))
        y, h, *given = flat
        check_norm_linear((y, h), *given, None, post_weight, weight, up=up.flatten(0, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows_give_an_empty_result(dtype, device):
    x, weight = torch.randn(6, 8, device=device).to(dtype).split((0, 6))
    y, h = norm_linear(x, None, weight[0], None, weight, geglu=True)
    assert linear(x, weight).shape == (0, 6) and y.shape == (0, 3) and h.shape == (0, 8)


def test_the_kernel_is_launched_for_1_to_max_rows_only(device, monkeypatch):
    launches = []
    monkeypatch.setattr(matvec, "_launch", lambda given, *_: launches.append(given) or given[:2])
    weight = torch.randn(4, 16, device=device)
    for shape in ((1, 1), (1, MAX_ROWS), (2, MAX_ROWS // 2), (1, MAX_ROWS + 1), (1, 0)):
        linear(torch.randn(*shape, 16, device=device), weight)
    on_kernels = device == "cuda" or bool(knobs.runtime.interpret)
    assert len(launches) == (3 if on_kernels else 0)


@pytest.mark.parametrize("dim", [256, 1536, 2048, 2560, 3840, 4096, 5376, 6144, 21504], ids=str)
def test_blocks_of_a_row_fit_rows_of_gemma_4(dim):
    """The part of the last block that lies beyond the row is at most a third of the row."""
    weight = Weight(torch.empty(4096, dim, dtype=torch.half, device="meta"))
    block = matvec.default_config(1, weight, 2)["BLOCK_K"]
    assert 3 * (-dim % block) <= dim


def test_norm_linear_refuses_what_its_steps_do_not_compute(device):
    x, norm_weight, weight = (torch.randn(n, 8, device=device) for n in (1, 1, 6))
    norm_weight, up = norm_weight[0], torch.randn(1, 6, device=device)
    for given, options in (
        ((x, None, None, None), {}),  # that is `linear`
        ((x, None, norm_weight, norm_weight), {}),
        ((x, x, None, norm_weight), {"layer_scalar": up[0, :1]}),
        ((x, x, norm_weight, None), {"up": up, "geglu": True}),
        ((x, x, norm_weight, None), {"up": up[:, :5]}),
    ):
        with pytest.raises(AssertionError):
            norm_linear(*given, weight, **options)


def test_weight_of_wrong_shape_raises(device):
    weight = torch.randn(6, 8, device=device)
    with pytest.raises(AssertionError, match=r"\(6, 8\).*\(2, 9\)"):
        linear(torch.randn(2, 9, device=device), weight)
    with pytest.raises(AssertionError, match=r"\(6, 8\).*\(2, 9\)"):
        norm_linear(torch.randn(2, 9, device=device), None, weight[0], None, weight)
