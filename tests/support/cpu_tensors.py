"""Inputs of C kernels: dtypes, dims, unaligned copies, and numbers of threads."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Less than a vector, several vectors and a rest, whole vectors, more than one block.
DIMS = [1, 7, 37, 640, 2053]


def unaligned(x: Tensor) -> Tensor:
    """Returns a copy that starts one element after an address that is aligned to 16 bytes."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
    assert not x.numel() or memory.data_ptr() % 16
    return memory.view(x.shape).copy_(x)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """In this context, ops run on this number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same_bits(*results: Tensor) -> bool:
    """Whether results are equal, with NaN equal to NaN."""
    first, *others = (x.contiguous().view(torch.uint8) for x in results)
    return all(torch.equal(x, first) for x in others)
