"""Builds of the C kernels for a CPU: none, as on a machine without gcc, and other instructions."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from gemma_fast.kernels.cpu import calls
from gemma_fast.kernels.cpu import library as library_file
from gemma_fast.model import packing

library = library_file.library
needs_c = pytest.mark.skipif(library() is None, reason="needs gcc, which compiles the C kernels")

# Name → -march. A processor with AVX512 also runs what is compiled for others.
BUILDS = {"native": "native"}
if torch.cpu.get_capabilities().get("architecture") == "x86_64":
    BUILDS["no vector intrinsics"] = "x86-64"
    if torch.cpu.get_capabilities()["avx512_f"]:
        BUILDS["AVX2"] = "x86-64-v3"


@contextmanager
def without_c() -> Iterator[None]:
    """In this context, ops on CPU tensors run their PyTorch references."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (calls, packing):
            patch.setattr(module, "library", lambda: None)
        yield


@contextmanager
def built_for(build: str) -> Iterator[None]:
    """In this context, the C kernels are those of one of BUILDS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "library", lambda: compiled(build))
        patch.setattr(calls, "_function", functools.cache(calls._function.__wrapped__))
        yield


@functools.cache
def compiled(build: str):
    """Compiles with the flags of a build, or finds the result in the user's cache."""
    flags = [flag for flag in library_file.FLAGS if not flag.startswith("-march")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library_file, "FLAGS", (*flags, f"-march={BUILDS[build]}"))
        found = library.__wrapped__()
    assert found is not None, f"the C kernels do not compile for {build}"
    return found
