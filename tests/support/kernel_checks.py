"""Contains dtypes, limits of GPUs, strided inputs and sampling for kernel tests."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from gemma_fast.kernels.launch import Gpu, as_on

# The interpreter multiplies bf16 matrices as integers, so bf16 needs a GPU.
DTYPES = [torch.float32, torch.float16]
if torch.cuda.is_available():
    DTYPES.append(torch.bfloat16)

# GPUs with tensor descriptors. Blocks are largest for 1 multiprocessor, and smaller for 132.
HOPPERS = {"1 SM": Gpu(90, 232_448, 1), "132 SMs": Gpu(90, 232_448, 132)}
MANY_MULTIPROCESSORS = Gpu(80, 232_448, 132)  # not 90, because the interpreter cannot run PDL


def multiprocessors(many: bool) -> AbstractContextManager[None]:
    """Returns a context in which decode attention uses many splits if `many`, otherwise few. On a
    GPU, the context changes nothing."""
    return as_on(MANY_MULTIPROCESSORS) if many and not torch.cuda.is_available() else nullcontext()


def strided(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Returns random numbers of this shape. The rows are not adjacent in memory."""
    return torch.randn(*shape[:-1], shape[-1] + 24, device=device).to(dtype)[..., : shape[-1]]


def tf32(x: Tensor) -> Tensor:
    """Rounds fp32 numbers to the 11 significant bits that tensor cores use for TF32."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def sampled(temperature=0.7, seed=(5 << 40) + 77, device="cpu"):
    """Returns temperature :: [1] and seed :: [1]. `chosen` expands them to all rows."""
    return torch.full((1,), temperature, device=device), torch.tensor([seed], device=device)


def chosen(op, *given, b, device, position=None, **options):
    """Returns the tokens that an op samples. `given` are the op's arguments before `position`."""
    for name in {"temperature", "seed"} & options.keys():
        if options[name] is not None:
            options[name] = options[name].expand(b).contiguous()
    token = torch.full((b,), -7, device=device)
    counter = torch.zeros(b + 1, dtype=torch.int32, device=device)
    if position is None:
        position = torch.arange(3, 3 + b, dtype=torch.int32, device=device)
    op(*given, position, token, counter, **options)
    assert not counter.any(), "the kernel did not reset its counter"
    return token
