"""Calls of the C kernels: the ops' tensors → pointers, sizes and dtypes.

Results are those of the ops' references, up to rounding: arithmetic is in fp32, and each result is
rounded once. Weights, packed or not, are exact.
"""

import ctypes
import functools
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from gemma_fast.kernels._triton import knobs
from gemma_fast.kernels.cpu.library import library
from gemma_fast.kernels.cpu.replay import recorder, run_calls
from gemma_fast.kernels.packed import Weight

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.uint8: 4}
FLOATS = torch.float32, torch.bfloat16, torch.float16
# The most rows of x that C multiplies with a weight that is not packed, and with a packed one. With
# more rows, a library's matmul takes less time (benchmarks/LOG.md).
MAX_ROWS = {torch.float32: (64, 64), torch.bfloat16: (16, 32), torch.float16: (64, 64)}
PARALLEL = 1 << 15  # elements from which a second thread pays


class NormArgs(ctypes.Structure):
    """norm_t of norm.h."""

    _fields_ = (
        ("x", c_void_p), ("residual", c_void_p), ("weight", c_void_p), ("post_weight", c_void_p),
        ("layer_scalar", c_void_p), ("dtype", c_int), ("weight_dtype", c_int),
        ("post_dtype", c_int), ("normalize", c_int), ("eps", c_float), ("offset", c_float),
        ("dim", c_int64),
    )  # fmt: skip


class WeightArgs(ctypes.Structure):
    """weight_t of weight.h."""

    _fields_ = (
        ("data", c_void_p), ("scale", c_void_p), ("minimum", c_void_p), ("out", c_int64),
        ("dim", c_int64), ("group", c_int64), ("dtype", c_int), ("factor_dtype", c_int),
    )  # fmt: skip


def runs_c(x: Tensor) -> bool:
    """Whether the C kernels compute with x: it is on a CPU, and Triton's interpreter is off."""
    on_cpu = x.is_cpu and x.dtype in FLOATS and not knobs.runtime.interpret
    return on_cpu and library() is not None


def is_matvec(x: Tensor, weight: Weight) -> bool:
    """Whether the C kernel for few rows computes x @ weightᵀ."""
    if not (x.numel() and weight.data.numel() and reads(weight) and runs_c(x)):
        return False
    return x.numel() <= max_rows(x.dtype, weight) * x.shape[-1]


def max_rows(dtype: torch.dtype, weight: Weight) -> int:
    """Returns the most rows of x, in this dtype, that C multiplies with the weight."""
    return MAX_ROWS[dtype][weight.scale is not None]


def reads(weight: Weight) -> bool:
    """Whether the C kernels can read this weight: its rows are adjacent in memory."""
    return all(part is None or part.is_contiguous() for part in weight)


def pointer(x: Tensor | None) -> int | None:
    if x is None:
        return None
    assert x.is_cpu, f"a tensor is on {x.device}, and others are on a CPU"
    if recorder.tensors is not None:
        recorder.tensors.append(x)
    return x.data_ptr()


def contiguous(x: Tensor) -> Tensor:
    if x.is_contiguous():
        return x
    recorder.missed = True  # a repeated call would not copy
    return x.contiguous()


def _rows(x: Tensor) -> Tensor:
    """Returns x :: [rows, dim]."""
    rows = x.reshape(-1, x.shape[-1])
    recorder.missed |= rows.data_ptr() != x.data_ptr()  # as in contiguous
    return rows


def weight_args(weight: Weight) -> WeightArgs:
    data, scale, minimum = weight
    out, dim = weight.shape
    return WeightArgs(
        pointer(data), pointer(scale), pointer(minimum), out, dim, weight.group,
        DTYPES[data.dtype], 0 if scale is None else DTYPES[scale.dtype],
    )  # fmt: skip


def matvec(
    x: Tensor, weight: Weight, *, residual: Tensor | None = None,
    norm_weight: Tensor | None = None, post_norm_weight: Tensor | None = None,
    layer_scalar: Tensor | None = None, up: Tensor | None = None, geglu: bool = False,
    eps: float = 0.0, offset: float = 0.0, out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Returns (y, h) of norm_linear; without norms, y of linear and None.

    out_dtype: of y; by default x.dtype
    """
    (out_dim, dim), shape = weight.shape, x.shape
    rows, out_dim = x.numel() // dim, out_dim // (1 + geglu)
    x = contiguous(x)
    normed = norm_weight is not None or post_norm_weight is not None
    y = torch.empty(*shape[:-1], out_dim, dtype=out_dtype or x.dtype)
    h = torch.empty_like(x) if normed else None
    if residual is not None:
        residual = contiguous(residual)
    if up is not None:
        up = _rows(up)
    norm = _norm_args(
        x, residual, norm_weight, post_norm_weight, layer_scalar, eps, offset,
        norm_weight is not None,
    )  # fmt: skip
    call(
        "matvec", byref(norm), byref(weight_args(weight)), rows, pointer(h), pointer(up),
        0 if up is None else up.stride(0), geglu, pointer(y), DTYPES[y.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return y, h


def _norm_args(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, post_weight: Tensor | None,
    layer_scalar: Tensor | None, eps: float, offset: float, normalizes: bool,
) -> NormArgs:  # fmt: skip
    return NormArgs(
        pointer(x), pointer(residual), pointer(weight), pointer(post_weight),
        pointer(layer_scalar), DTYPES[x.dtype], 0 if weight is None else DTYPES[weight.dtype],
        0 if post_weight is None else DTYPES[post_weight.dtype], normalizes, eps, offset,
        x.shape[-1],
    )  # fmt: skip


def norm(
    x: Tensor, weight: Tensor | None, residual: Tensor | None = None,
    post_weight: Tensor | None = None, layer_scalar: Tensor | None = None, *, eps: float,
    offset: float, normalizes: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Returns (y, h) of rmsnorm.py; h is None without residual.

    normalizes: False: y is h
    """
    x = contiguous(x)
    weight, residual, post_weight = (
        None if part is None else contiguous(part) for part in (weight, residual, post_weight)
    )
    y, h = torch.empty_like(x), None
    if normalizes and residual is not None:
        h = torch.empty_like(x)
    args = _norm_args(x, residual, weight, post_weight, layer_scalar, eps, offset, normalizes)
    rows = x.numel() // x.shape[-1]
    call("norm", byref(args), rows, pointer(h), pointer(y), threads(x.numel()))
    return y, h


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Returns gelu(gate) * up."""
    dim = gate.shape[-1]
    y = torch.empty(gate.shape, dtype=gate.dtype)
    gate, up = _rows(gate), _rows(up)
    call(
        "geglu", pointer(gate), pointer(up), DTYPES[gate.dtype], len(gate), dim,
        gate.stride(0), up.stride(0), pointer(y), threads(y.numel()),
    )  # fmt: skip
    return y


def best_token(logits: Tensor, token: Tensor) -> None:
    """Writes the most likely token of each row of logits :: [b, vocab], fp32, contiguous; see
    sample.py."""
    count = 1 if len(logits) == 1 else threads(logits.numel())
    call("best_token", pointer(logits), *logits.shape, pointer(token), count)


class HeadArgs(ctypes.Structure):
    """head_t of rotary.h."""

    _fields_ = (
        ("norm_weight", c_void_p), ("dtype", c_int), ("norm_dtype", c_int), ("norm", c_int),
        ("eps", c_float), ("offset", c_float), ("dim", c_int64),
    )  # fmt: skip


def head_args(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, normed: bool | None = None
) -> HeadArgs:
    normed = weight is not None if normed is None else normed
    norm_dtype = 0 if weight is None else DTYPES[weight.dtype]
    return HeadArgs(pointer(weight), DTYPES[x.dtype], norm_dtype, normed, eps, offset, x.shape[-1])


def rotary(
    x: Tensor, out: Tensor, cos: Tensor | None, sin: Tensor | None, weight: Tensor | None, *,
    eps: float, offset: float, normed: bool | None = None, query_offset: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes normalized and rotated heads x :: [b, t, heads, d] to out :: [b, heads, slots, d].

    query_offset: [b], int32: token i's slot is (query_offset + i) % slots, and only the last tokens
    are kept; None: it is i
    normed: whether heads are normalized; None: if there is a weight
    """
    b, t, heads, _ = x.shape
    slots = out.shape[2]
    cos, sin, weight, query_offset = (
        None if part is None else contiguous(part) for part in (cos, sin, weight, query_offset)
    )
    args = head_args(x, weight, eps, offset, normed)
    call(
        "rotary", byref(args), pointer(x), strides(x), pointer(cos), pointer(sin), b, t,
        heads, max(t - slots, 0), pointer(query_offset), pointer(out), strides(out),
        0 if query_offset is None else slots, threads(x.numel()),
    )  # fmt: skip


def unpack(weight: Weight, start: int, stop: int, out: Tensor) -> Tensor:
    """Writes rows `start` to `stop` - 1 of a packed weight to the flat tensor `out`. Returns them
    as a view of it :: [stop - start, dim]."""
    shape = stop - start, weight.shape[1]
    rows = out[: shape[0] * shape[1]].view(shape)
    call(
        "unpack", byref(weight_args(weight)), start, stop, pointer(rows), DTYPES[out.dtype],
        threads(rows.numel()),
    )  # fmt: skip
    return rows


def strides(x: Tensor) -> Any:
    return (c_int64 * 3)(*x.stride()[:3])


def threads(elements: int) -> int:
    """Returns the number of threads for elementwise work: one if there is little."""
    return 1 if elements < PARALLEL else torch.get_num_threads()


ARGUMENTS = {
    "matvec": (
        POINTER(NormArgs), POINTER(WeightArgs), c_int64, c_void_p, c_void_p, c_int64, c_int,
        c_void_p, c_int, c_int,
    ),
    "norm": (POINTER(NormArgs), c_int64, c_void_p, c_void_p, c_int),
    "geglu": (c_void_p, c_void_p, c_int, c_int64, c_int64, c_int64, c_int64, c_void_p, c_int),
    "rotary": (
        POINTER(HeadArgs), c_void_p, POINTER(c_int64), c_void_p, c_void_p, c_int64, c_int64,
        c_int64, c_int64, c_void_p, c_void_p, POINTER(c_int64), c_int64, c_int,
    ),
    "decode_attention": (
        c_void_p, POINTER(HeadArgs), POINTER(HeadArgs), POINTER(HeadArgs), c_int,
    ),
    "prompt_attention": (c_void_p, c_int),
    "route": (c_void_p, POINTER(WeightArgs), c_int64, c_int),
    "experts": (c_void_p, POINTER(WeightArgs), POINTER(WeightArgs), c_int),
    "sum_terms": (c_void_p, c_void_p, c_void_p, c_int64, c_int),
    "best_token": (c_void_p, c_int64, c_int64, c_void_p, c_int),
    "unpack": (POINTER(WeightArgs), c_int64, c_int64, c_void_p, c_int, c_int),
}  # fmt: skip

NO_RESULT = "geglu", "rotary", "best_token", "unpack", "sum_terms"  # functions that cannot fail


@functools.cache
def _function(name: str) -> Any:
    function = getattr(library(), name)
    function.argtypes = ARGUMENTS[name]
    if name in NO_RESULT:
        function.restype = None
    return function


def call(name: str, *args: Any) -> None:
    """Calls a C function, and records the call. Raises MemoryError if it returns nonzero."""
    function = _function(name)
    if recorder.calls is not None:
        recorder.calls.append((function, args))
    run_calls([(function, args)])
