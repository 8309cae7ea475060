"""Matmuls with many rows: the library that this processor runs fastest.

PyTorch has two for float32. F.linear calls MKL, which takes 1.3 to 2.6 times as long as oneDNN on
an AMD EPYC, and 0.8 times as long on a Xeon (benchmarks/LOG.md). So both are measured.
"""

import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor, Tensor], Tensor]
ROWS, OUT, DIM = 128, 1024, 640  # of the matmul that is measured: 1 to 2 ms on two cores
REPEATS = 5


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Returns x @ weightᵀ, x :: [rows, dim], both in one dtype."""
    return fastest_fp32()(x, weight) if x.dtype == torch.float32 else F.linear(x, weight)


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@functools.cache
def fastest_fp32() -> Linear:
    """Returns the fastest function for float32, by a measurement of about 20 ms."""
    if not torch.backends.mkldnn.is_available():
        return F.linear
    x, weight = torch.randn(ROWS, DIM), torch.randn(OUT, DIM)
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
