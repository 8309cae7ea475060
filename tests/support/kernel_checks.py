"""What the kernels' tests share: dtypes, tolerances, awkward layouts."""

import torch
from torch import Tensor

# The interpreter multiplies bf16 matrices as integers: bf16 is for a GPU.
DTYPES = [torch.float32, torch.float16]
if torch.cuda.is_available():
    DTYPES.append(torch.bfloat16)

# One rounding to the dtype (an ulp is 2^-10 of fp16, 2^-7 of bf16), or a few of fp32.
TOLERANCE = {
    torch.float32: {"rtol": 3e-6, "atol": 3e-6},
    torch.float16: {"rtol": 6e-4, "atol": 3e-6},
    torch.bfloat16: {"rtol": 4.5e-3, "atol": 3e-6},
}


def strided(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Random numbers in rows that lie apart."""
    return torch.randn(*shape[:-1], shape[-1] + 24, device=device).to(dtype)[..., : shape[-1]]
