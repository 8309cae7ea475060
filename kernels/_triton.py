"""Triton if it is installed, as on Linux, and has a use; else a stand-in, so that kernel files can
be imported.

Without Triton, ops run their PyTorch references, as for any tensor that is not on a GPU. Triton's
import takes 0.2 s, so it is imported only if there is a GPU, if TRITON_INTERPRET is set, or if
another module has imported it before.
"""

import os
import sys

import torch

try:
    used = "TRITON_INTERPRET" in os.environ or "triton" in sys.modules
    if not used and torch.cuda.device_count() == 0:
        raise ModuleNotFoundError
    import triton
    import triton.language as tl
    from triton import knobs
    from triton.tools.tensor_descriptor import TensorDescriptor
except ModuleNotFoundError:

    class _Absent:
        def __getattr__(self, name):  # tl.constexpr, knobs.runtime
            return self

        def __call__(self, function=None, **options):  # triton.jit, with and without options
            return function or self

        def __bool__(self):  # knobs.runtime.interpret
            return False

    triton = tl = knobs = TensorDescriptor = _Absent()  # type: ignore[assignment]

__all__ = ["TensorDescriptor", "knobs", "tl", "triton"]
