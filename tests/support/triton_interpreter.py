"""Runs kernels on CPU tensors in Triton's interpreter, within the context `interpreter`."""

from contextlib import contextmanager
from functools import cache

import torch
from triton import knobs
from triton import language as tl
from triton.runtime import interpreter as triton_interpreter


@cache
def _builtins(package) -> list[str]:
    return [name for name in dir(package) if tl.core.is_builtin(getattr(package, name))]


def _patch_builtins(package, builder, scope) -> None:
    for name in _builtins(package):
        member = getattr(package, name)
        if tl.core.is_builtin(member):
            triton_interpreter._patch_attr(package, name, member, builder, scope)


# Whenever a kernel calls a function such as tl.sum, Triton searches triton.language for builtins to
# patch. This takes a third of the interpreter's time. The builtins never change, so this module
# caches them.
for _package in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base):
    _builtins(_package)
triton_interpreter._patch_builtin = _patch_builtins


@contextmanager
def interpreter():
    """In this context, without a GPU, ops on CPU tensors run their kernels in the interpreter."""
    with knobs.runtime.scope():
        knobs.runtime.interpret = not torch.cuda.is_available()
        yield
