"""Copies between the host and a device that do not wait for the device."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def copy_to_host(*tensors: Tensor) -> list[Callable[[], Tensor]]:
    """Starts to copy tensors to the host. Returns for each a function that waits for its copy, then
    returns it. The tensors may change after this call."""
    cuda = tensors[0].is_cuda
    copies = [torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=cuda) for x in tensors]
    for copy, x in zip(copies, tensors, strict=True):
        copy.copy_(x, non_blocking=True)
    done = torch.cuda.Event() if cuda else None
    if done is not None:
        done.record(torch.cuda.current_stream(tensors[0].device))

    def wait(copy: Tensor) -> Tensor:
        if done is not None:
            done.synchronize()
        return copy

    return [functools.partial(wait, copy) for copy in copies]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor of the host on the device."""
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
