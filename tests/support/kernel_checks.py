"""For the tests of kernels: dtypes, tolerances, GPUs that need not be here, strided rows."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from gemma_fast.kernels.launch import Gpu, as_on

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
# Limits of `attention_error`: weights and rotated queries are rounded to the dtype.
ATTENTION_ERROR = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

# GPUs with tensor descriptors. One multiprocessor gets the largest tiles, 132 get halved ones.
HOPPERS = {"one": Gpu(90, 232_448, 1), "132": Gpu(90, 232_448, 132)}
MANY_MULTIPROCESSORS = Gpu(80, 232_448, 132)  # below 90: the interpreter knows no prefetch


def attention_error(out: Tensor, expected: Tensor) -> float:
    """RMS error of the worst head [..., d], over the RMS of the result. (The maximum over channels
    grows with d; the RMS does not.)"""
    error, expected = out.double() - expected.double(), expected.double()
    worst = error.square().mean(-1).sqrt().max()
    return float(worst / expected.square().mean().sqrt())


def multiprocessors(many: bool) -> AbstractContextManager[None]:
    """Within it decode attention has many splits, or few; on a GPU as many as that has."""
    return as_on(MANY_MULTIPROCESSORS) if many and not torch.cuda.is_available() else nullcontext()


def strided(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Random numbers in rows that lie apart."""
    return torch.randn(*shape[:-1], shape[-1] + 24, device=device).to(dtype)[..., : shape[-1]]
