"""Switches the C kernels for CPUs off, as on a machine without a compiler."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gemma_fast.kernels.cpu.library import library

needs_c = pytest.mark.skipif(library() is None, reason="needs gcc, which compiles the C kernels")


@contextmanager
def without_c() -> Iterator[None]:
    """In this context, ops on CPU tensors run their PyTorch references."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", "/nonexistent/gcc")
        library.cache_clear()
        assert library() is None
        try:
            yield
        finally:
            library.cache_clear()
