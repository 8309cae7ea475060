"""Providers that several suites share: torch.compile, SDPA, and our op without descriptors.

PACKAGES lists the packages that rivals need.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gemma_fast.benchmarks.kernels.suite import Call, Prepare
from gemma_fast.benchmarks.measure.machine import installed_version
from gemma_fast.kernels.launch import override

SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}

# Packages on PyPI that providers need besides torch: provider → names of the packages. Providers
# whose names begin with transformers are not listed here; `missing` adds their package.
PACKAGES = {
    "liger": ["liger-kernel"],
    "liger (CuTe)": ["liger-kernel", "nvidia-cutlass-dsl"],
    "quack": ["quack-kernels"],
    "flashinfer": ["flashinfer-python"],
    "flash-attn-4": ["flash-attn-4"],
    "GemLite": ["gemlite"],
    "bitsandbytes": ["bitsandbytes"],
}
RIVALS = sorted({package for packages in PACKAGES.values() for package in packages})


def missing(provider: str) -> list[str]:
    """Returns the packages that the provider needs but that are not installed."""
    needed = ["transformers"] if provider.startswith("transformers") else PACKAGES.get(provider, [])
    return [x for x in needed if installed_version(x) is None]


def plain(function: Callable[..., Any]) -> Prepare:
    """Returns a provider that calls function(*inputs), without preparation."""
    return lambda *inputs: lambda: function(*inputs)


def torch_compiled(function: Callable[..., Any]) -> Prepare:
    """Returns a provider that calls the function compiled by torch.compile."""
    return lambda *inputs: lambda: compiled(function)(*inputs)


@cache  # because Dynamo compiles again for each object that torch.compile returns
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles the function for static shapes; autotunes on a GPU. CUDA graphs are off, because
    measure/timing.py captures the calls in its own graph."""
    if torch.cuda.is_available():
        mode = "max-autotune-no-cudagraphs"
        return torch.compile(function, mode=mode, dynamic=False, fullgraph=True)
    return torch.compile(function, backend="aot_eager", dynamic=False, fullgraph=True)


def sdpa(backend: SDPBackend, q: Tensor, keys: Tensor, values: Tensor, **options: Any) -> Call:
    """Returns a call that computes attention :: [b, heads, t, d] with one of PyTorch's backends.

    q :: [b, heads, t, d]; keys, values :: [b, n, s, d]

    Raises NotImplementedError if the backend has no kernel for these inputs.
    """
    if backend == SDPBackend.EFFICIENT_ATTENTION:  # needs one kv head per query head
        group = q.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    grouped = q.shape[1] != keys.shape[1]

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, keys, values, enable_gqa=grouped, **options)

    try:
        call()
    except RuntimeError as error:
        if "No available kernel" not in str(error) and "No viable backend" not in str(error):
            raise
        raise NotImplementedError("this backend has no kernel") from error
    return call


def by_pointers(kernel: str, ours: Prepare) -> Prepare:
    """Returns the provider `ours`, but with tiles loaded through pointers, not descriptors."""

    def prepare(*inputs: Any) -> Call:
        call = ours(*inputs)

        def run() -> Any:
            with override(kernel, DESCRIPTORS=False):
                return call()

        return run

    return prepare
