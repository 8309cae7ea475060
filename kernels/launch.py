"""Launching kernels: whether Triton runs, the limits of the GPU, the launch config.

config = launch_config("attention", default_config(…))  # in every launcher
with override("attention", BLOCK_N=32): …                # in tuning: another launch config
with as_on(Gpu(90, 232_448, 132)): …                     # in tests: the limits of another GPU
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemma_fast.kernels._triton import knobs, triton


class Gpu(NamedTuple):
    """Limits of a GPU that launch configs depend on."""

    capability: int  # 90: compute capability 9.0
    shared_memory: int  # bytes available to one program
    multiprocessors: int

    def can_describe(self, *tensors: Tensor) -> bool:
        """Whether tensor descriptors can copy tiles of them to shared memory in hardware (TMA)."""
        return self.capability >= 90 and all(
            x.element_size() == 2
            and all(n % 16 == 0 for n in (x.data_ptr(), *(2 * s for s in x.stride()[:-1])))
            for x in tensors
        )

    def pdl_options(self, pdl: bool) -> dict[str, bool]:
        """Launch options of a kernel that calls `wait_for_previous_kernel`."""
        if pdl and self.capability >= 90:
            return {"PDL": True, "launch_pdl": True}
        return {"PDL": False}


_overrides: dict[str, Mapping[str, Any]] = {}
_as_on: list[Gpu] = []


def runs_triton(x: Tensor) -> bool:
    """Whether Triton runs on x, so that ops run their kernels and not their references: x is on a
    GPU, or TRITON_INTERPRET=1."""
    return x.is_cuda or bool(knobs.runtime.interpret)


def gpu(device: torch.device) -> Gpu:
    """Returns the limits of the device; for a CPU (the interpreter), the limits of a small GPU."""
    return _as_on[-1] if _as_on else _limits(device)


def launch_config(kernel: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the kernel's launch config: `table`, updated by an active `override`.

    FP fusion (multiply-add) is set explicitly: results depend on it, and Triton's default differs
    between versions and can be changed in the environment.
    """
    return {"enable_fp_fusion": True, **table, **_overrides.get(kernel, {})}


@contextmanager
def override(kernel: str, **config: Any) -> Iterator[None]:
    """Sets values of the kernel's launch config inside the `with` block, for all threads."""
    before = _overrides.get(kernel)
    _overrides[kernel] = {**(before or {}), **config}
    try:
        yield
    finally:
        del _overrides[kernel]
        if before is not None:
            _overrides[kernel] = before


@contextmanager
def as_on(limits: Gpu) -> Iterator[None]:
    """Launches kernels with the limits of another GPU inside the `with` block, for all threads."""
    _as_on.append(limits)
    try:
        yield
    finally:
        _as_on.pop()


@functools.cache
def _limits(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return Gpu(capability=80, shared_memory=101_376, multiprocessors=2)
    major, minor = torch.cuda.get_device_capability(device)
    limits = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return Gpu(10 * major + minor, limits["max_shared_mem"], limits["multiprocessor_count"])
