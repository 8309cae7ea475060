"""How kernels are launched: where Triton runs, the limits of the GPU, the launch config.

config = launch_config("attention", tile(…))      # in every launcher: the table's entry
with override("attention", BLOCK_N=32): …          # for tuning: another entry
with as_on(Gpu(90, 232_448, 132)): …               # for tests: the limits of another GPU
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemma_fast.kernels._triton import knobs, triton


class Gpu(NamedTuple):
    capability: int  # 90: compute capability 9.0
    shared_memory: int  # bytes that one program can have
    multiprocessors: int

    def can_describe(self, *tensors: Tensor) -> bool:
        """Whether tensor descriptors can copy tiles of them, in hardware (TMA), to tensor cores."""
        return self.capability >= 90 and all(
            x.element_size() == 2
            and all(n % 16 == 0 for n in (x.data_ptr(), *(2 * s for s in x.stride()[:-1])))
            for x in tensors
        )

    def overlap(self, prefetch: bool) -> dict[str, bool]:
        """Options of a kernel that begins with `wait_for_previous_kernel`."""
        if prefetch and self.capability >= 90:
            return {"PREFETCH": True, "launch_pdl": True}
        return {"PREFETCH": False}


_overrides: dict[str, Mapping[str, Any]] = {}
_as_on: list[Gpu] = []


def runs_triton(x: Tensor) -> bool:
    """Whether ops run their kernels on x, compiled or interpreted, and not their references."""
    return x.is_cuda or bool(knobs.runtime.interpret)


def gpu(device: torch.device) -> Gpu:
    """The limits that launch configs are chosen by; the smallest, for the interpreter."""
    return _as_on[-1] if _as_on else _limits(device)


def launch_config(kernel: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of the kernel's table, with the values of an `override` in force.

    Multiplications and additions are fused, whatever this Triton's default is: it differs between
    versions and can be set in the environment, and results would differ with it.
    """
    return {"enable_fp_fusion": True, **table, **_overrides.get(kernel, {})}


@contextmanager
def override(kernel: str, **config: Any) -> Iterator[None]:
    """Within it the kernel's launch config has these values, in every thread: for one at a time."""
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
    """Within it kernels are launched as on a GPU of these limits, in every thread: for one at a
    time."""
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
