"""geglu against fp64."""

import math

import pytest
import torch
from kernel_checks import DTYPES, TOLERANCE, strided

from gemma_fast.kernels.geglu import geglu


def oracle(gate_up):
    gate, up = gate_up.double().chunk(2, dim=-1)
    z = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return gate / 2 * (1 + torch.tanh(z)) * up


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (3, 2048), (2, 5, 88), (4, 3000), (0, 64)], ids=str)
def test_geglu(shape, dtype, device, poison_outputs):
    gate_up = (3 * torch.randn(shape, device=device)).to(dtype)
    out = geglu(gate_up)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), oracle(gate_up), **TOLERANCE[dtype])


def test_strided_rows(device, poison_outputs):
    gate_up = strided((5, 128), torch.float32, device)
    torch.testing.assert_close(geglu(gate_up).double(), oracle(gate_up), **TOLERANCE[torch.float32])


def test_it_is_the_tanh_approximation(device):
    gate_up = torch.tensor([[-2.7, 1.0]], device=device)
    exact = torch.nn.functional.gelu(gate_up[:, :1])
    assert (geglu(gate_up) - exact).abs() > 4e-4
    assert (geglu(gate_up) - oracle(gate_up)).abs() < 1e-6


def test_large_gates_do_not_overflow(device):
    gate_up = torch.tensor([[60.0, -60.0, 2.0, 3.0]], device=device, dtype=torch.float16)
    assert geglu(gate_up).tolist() == [[120.0, 0.0]]


def test_odd_width(device):
    with pytest.raises(AssertionError, match=r"one size.*\(2, 5\)"):
        geglu(torch.randn(2, 5, device=device))
