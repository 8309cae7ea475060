"""Registers ops with PyTorch. Also has the wait for the previous kernel (programmatic dependent
launch, PDL)."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from gemma_fast.kernels._triton import tl, triton
from gemma_fast.kernels.cpu.replay import recorder
from gemma_fast.kernels.packed import PackedWeight

F = TypeVar("F", bound=Callable[..., Any])
_library = torch.library.Library("gemma_fast", "DEF")


def op(fake: Callable[..., Any], mutates_args: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Registers a launcher as torch.ops.gemma_fast.<its name>, for eager mode and torch.compile.

    fake          returns empty outputs of the right shape, dtype and strides
    mutates_args  names of the tensors that are written in place

    The op runs on the GPU of its first tensor. torch.compile treats it as opaque. (A `triton_op`
    would not be, but costs 8 µs a call instead of 4, and imports the compiler.) A PackedWeight for
    the parameter `weight` is passed as its data, with `weight_scale` and `weight_minimum`. Raises
    ValueError if a tensor needs a gradient, backward or forward.
    """

    def register(launcher: F) -> F:
        name, names = launcher.__name__, list(inspect.signature(launcher).parameters)
        _library.define(name + torch.library.infer_schema(launcher, mutates_args=mutates_args))
        overload = getattr(torch.ops.gemma_fast, name).default

        def launch(*args: Any, **kwargs: Any) -> Any:
            device = args[0].device
            if device.type == "cpu":
                return recorder.run(launcher, *args, **kwargs)
            if device.type != "cuda" or device.index == torch.cuda.current_device():
                return launcher(*args, **kwargs)
            with torch.cuda.device(device):  # Triton launches on the current device
                return launcher(*args, **kwargs)

        def without_autograd(*args: Any, **kwargs: Any) -> Any:
            for parameter, value in (*zip(names, args, strict=False), *kwargs.items()):
                if isinstance(value, Tensor) and _differentiated(value):
                    raise ValueError(
                        f"{name} has no derivative, and {parameter} requires grad: "
                        "call it under torch.no_grad(), or detach the tensor"
                    )
                if parameter in mutates_args:
                    increment_version(value)  # autograd then detects writes to saved tensors
            with torch._C._AutoDispatchBelowAutograd():
                return overload(*args, **kwargs)

        _library.impl(name, launch, "CompositeExplicitAutograd")
        _library.impl(name, without_autograd, "Autograd")
        torch.library.register_fake(f"gemma_fast::{name}", fake, lib=_library)

        @functools.wraps(launcher)
        def call(*args: Any, **kwargs: Any) -> Any:
            for i, arg in enumerate(args):
                if isinstance(arg, PackedWeight):
                    data, scale, minimum = arg.weight
                    args = *args[:i], data, *args[i + 1 :]
                    name = names[i]
                    kwargs |= {f"{name}_scale": scale, f"{name}_minimum": minimum}
            return overload(*args, **kwargs)

        return call  # type: ignore[return-value]

    return register


def _differentiated(x: Tensor) -> bool:
    if x.requires_grad and torch.is_grad_enabled():
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


@triton.jit
def wait_for_previous_kernel(PDL: tl.constexpr):
    """With PDL, waits until the previous kernel has finished. Code before this call overlaps
    that kernel (programmatic dependent launch)."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        # Lets the next kernel start. Because this comes after the wait, at most two kernels
        # overlap: the previous kernel has finished before the next one starts.
        tl.extra.cuda.gdc_launch_dependents()
