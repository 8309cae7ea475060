"""Triton if it is installed, as on Linux; else a stand-in, so that kernel files can be imported.

Without Triton, ops run their PyTorch references, as for any tensor that is not on a GPU.
"""

try:
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
