"""Matmuls with many rows: the library that this processor runs fastest.

PyTorch has two for float32. F.linear calls MKL, which is slower than oneDNN on an AMD EPYC
(benchmarks/LOG.md), and faster on a Xeon with AMX. So both are measured.
"""

import functools
import threading
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_fast.kernels.cpu.calls import unpack
from gemma_fast.kernels.cpu.replay import recorder
from gemma_fast.kernels.packed import Weight

Linear = Callable[[Tensor, Tensor], Tensor]
ROWS, OUT, DIM = 128, 1024, 640  # of the matmul that is measured: 1 to 2 ms on two cores
REPEATS = 5
ELEMENTS = 1 << 22  # of a packed weight that are unpacked at once


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Returns x @ weightᵀ, x :: [rows, dim], both in one dtype."""
    recorder.missed = True  # a repeated C call that unpacks the weight would not compute this
    return fastest_fp32()(x, weight) if x.dtype == torch.float32 else F.linear(x, weight)


def packed_linear(x: Tensor, weight: Weight) -> Tensor:
    """Returns x @ weightᵀ, x :: [..., dim]. Unpacks some rows of the weight at a time, into memory
    that is used again: new memory costs a page fault for each 4 KB."""
    out, dim = weight.shape
    rows, step = x.reshape(-1, dim), max(ELEMENTS // dim, 1)
    scratch = _scratch(min(out, step) * dim, x.dtype)
    if out <= step:
        return linear(rows, unpack(weight, 0, out, scratch)).view(*x.shape[:-1], out)
    y = torch.empty(len(rows), out, dtype=x.dtype)
    for start in range(0, out, step):
        stop = min(start + step, out)
        y[:, start:stop] = linear(rows, unpack(weight, start, stop, scratch))
    return y.view(*x.shape[:-1], out)


class _Scratch(threading.local):
    memory = torch.empty(0, dtype=torch.float32)


_thread = _Scratch()


def _scratch(elements: int, dtype: torch.dtype) -> Tensor:
    """Returns this thread's memory for unpacked weights :: [at least elements]."""
    if _thread.memory.numel() < elements:
        _thread.memory = torch.empty(elements, dtype=torch.float32)
    return _thread.memory.view(dtype)


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@functools.cache
def fastest_fp32() -> Linear:
    """Returns the fastest function for float32, by a measurement of about 20 ms."""
    if not torch.backends.mkldnn.is_available():
        return F.linear
    # Not random: a caller's random numbers must not depend on this measurement.
    x, weight = (torch.ones(rows, DIM, dtype=torch.float32) for rows in (ROWS, OUT))
    candidates: tuple[Linear, ...] = _onednn, F.linear
    return min(candidates, key=lambda function: _seconds(function, x, weight))


def _seconds(function: Linear, x: Tensor, weight: Tensor) -> float:
    function(x, weight)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function(x, weight)
        times.append(time.perf_counter() - start)
    return min(times)
