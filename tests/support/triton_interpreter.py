"""Runs the kernels of CPU tensors in Triton's interpreter, where a test asks for it."""

from contextlib import contextmanager

import torch
from triton import knobs


@contextmanager
def interpreter():
    """Ops on CPU tensors run their Triton kernels in the interpreter."""
    with knobs.runtime.scope():
        knobs.runtime.interpret = not torch.cuda.is_available()
        yield
