"""What the kernels' tests share: dtypes, tolerances, awkward layouts, poisoned outputs."""

import pytest
import torch
from torch import Tensor

# The interpreter multiplies bf16 matrices as integers: bf16 is for a GPU.
DTYPES = [torch.float32, torch.float16]
if torch.cuda.is_available():
    DTYPES.append(torch.bfloat16)

# One rounding to the dtype (an ulp is 2^-10 of fp16, 2^-7 of bf16), or a few of fp32.
TOLERANCE = {
    torch.float32: {"rtol": 3e-6, "atol": 3e-6},
    torch.float16: {"rtol": 6e-4, "atol": 1e-6},
    torch.bfloat16: {"rtol": 4.5e-3, "atol": 1e-6},
}


def strided(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Random numbers in rows that lie apart."""
    return torch.randn(*shape[:-1], shape[-1] + 24, device=device).to(dtype)[..., : shape[-1]]


@pytest.fixture
def poison_outputs(monkeypatch):
    """torch.empty gives NaN, so that an element that a kernel does not write is seen."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(make):
        def wrapper(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))
