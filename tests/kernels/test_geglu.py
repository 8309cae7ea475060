"""Compares geglu and gate_up_geglu with fp64."""

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DTYPES, strided, tf32
from oracles import geglu_oracle, root_sum_square
from tolerances import GEGLU_ROUNDINGS, assert_rounded, geglu_size

from gemma_fast.kernels.geglu import gate_up_geglu, geglu


def geglu_of_halves(gate_up):
    return geglu(*gate_up.chunk(2, dim=-1))


def check(out, gate_up, roundings=GEGLU_ROUNDINGS, size=0.0):
    assert_rounded(out, geglu_oracle(gate_up), roundings, geglu_size(gate_up, size))


# Each function returns the result of a GeGLU with one mistake.
MISTAKES = {
    "GELU by erf": lambda gate, up: F.gelu(gate) * up,
    "SiLU": lambda gate, up: F.silu(gate) * up,
    "gate and up swapped": lambda gate, up: F.gelu(up, approximate="tanh") * gate,
    "GELU rounded": lambda gate, up: F.gelu(gate, approximate="tanh").half() * up,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_check_detects_a_mistake(mistake, dtype):
    gate_up = (3 * torch.randn(3, 2048)).to(dtype)
    check(geglu_oracle(gate_up).to(dtype), gate_up)
    with pytest.raises(AssertionError, match="times its bound"):
        check(MISTAKES[mistake](*gate_up.double().chunk(2, dim=-1)).to(dtype), gate_up)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (3, 2048), (2, 5, 88), (4, 3000), (0, 64)], ids=str)
def test_geglu_equals_fp64(shape, dtype, device, poison_outputs):
    gate_up = (3 * torch.randn(shape, device=device)).to(dtype)
    out = geglu_of_halves(gate_up)
    assert out.dtype == dtype
    check(out, gate_up)


def test_geglu_reads_strided_rows(device, poison_outputs):
    gate_up = strided((5, 128), torch.float32, device)
    check(geglu_of_halves(gate_up), gate_up)


def test_gelu_is_the_tanh_approximation(device):
    gate_up = torch.tensor([[-2.7, 1.0]], device=device)
    exact = torch.nn.functional.gelu(gate_up[:, :1])
    assert (geglu_of_halves(gate_up) - exact).abs() > 4e-4
    check(geglu_of_halves(gate_up), gate_up)


def test_large_gates_do_not_overflow(device):
    gate_up = torch.tensor([[60.0, -60.0, 2.0, 3.0]], device=device, dtype=torch.float16)
    assert geglu_of_halves(gate_up).tolist() == [[120.0, 0.0]]


@pytest.mark.parametrize("layout", ["contiguous", "different strides"])
def test_gate_and_up_may_be_separate_tensors(layout, device, poison_outputs):
    gate, up = torch.randn(2, 3, 5, 40, device=device)
    if layout == "different strides":
        gate, up = strided((3, 5, 40), torch.float32, device), up.transpose(0, 1).contiguous()
        up = up.transpose(0, 1)
    check(geglu(gate, up), torch.cat((gate, up), dim=-1))


def test_gate_and_up_of_different_widths_raise(device):
    gate, up = torch.randn(2, 3, device=device), torch.randn(2, 2, device=device)
    with pytest.raises(
        AssertionError, match=r"gate \(2, 3\) torch.float32 does not fit up \(2, 2\)"
    ):
        geglu(gate, up)


GATE_UP_SHAPES = [
    ((1, 64), 32), ((3, 5, 48), 40), ((65, 128), 130), ((129, 72), 64), ((300, 32), 257),
    ((0, 16), 8), ((1300, 8), 130), ((40, 20), 24),
]  # fmt: skip


def check_product(out, x, weight):
    gate_up, size = x.double() @ weight.double().T, root_sum_square(x, weight)
    check(out, gate_up, GEGLU_ROUNDINGS + x.shape[-1], size)


def test_check_detects_products_in_tf32():
    x, weight = torch.randn(65, 128), torch.randn(260, 128) / 128**0.5
    check_product(gate_up_geglu(x, weight), x, weight)
    with pytest.raises(AssertionError, match="times its bound"):
        check_product(gate_up_geglu(tf32(x), tf32(weight)), x, weight)


def check_gate_up(shape, dim, dtype, device):
    x = torch.randn(shape, device=device).to(dtype)
    weight = (torch.randn(2 * dim, shape[-1], device=device) / shape[-1] ** 0.5).to(dtype)
    out = gate_up_geglu(x, weight)
    assert out.dtype == dtype and out.shape == (*shape[:-1], dim)
    check_product(out, x, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), GATE_UP_SHAPES, ids=str)
def test_gate_up_geglu_equals_fp64(shape, dim, dtype, device, poison_outputs):
    check_gate_up(shape, dim, dtype, device)


@pytest.mark.parametrize(("shape", "dim"), GATE_UP_SHAPES, ids=str)
def test_gate_up_geglu_with_descriptors_equals_fp64(shape, dim, hopper, poison_outputs):
    check_gate_up(shape, dim, torch.float16, hopper)


def test_gate_up_geglu_reads_strided_rows(device, poison_outputs):
    x, weight = strided((5, 64), torch.float32, device), torch.randn(6, 64, device=device)
    check_product(gate_up_geglu(x, weight), x, weight)


def test_gate_up_geglu_reads_unaligned_rows(hopper):
    """Descriptors can read rows only if each row begins at a multiple of 16 bytes."""
    x = torch.randn(65 * 32 + 1, device=hopper).half()[1:].view(65, 32)
    weight = (torch.randn(48, 32, device=hopper) / 6).half()
    check_product(gate_up_geglu(x, weight), x, weight)


def test_weight_of_wrong_shape_raises(device):
    with pytest.raises(AssertionError, match=r"\(6, 8\).*\(2, 9\)"):
        gate_up_geglu(torch.randn(2, 9, device=device), torch.randn(6, 8, device=device))
