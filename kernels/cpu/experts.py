"""Calls of the C kernels for a mixture of experts."""

import ctypes
from ctypes import byref, c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from gemma_fast.kernels.cpu.calls import (
    DTYPES,
    call,
    contiguous,
    pointer,
    weight_args,
)
from gemma_fast.kernels.packed import Weight


class RouterArgs(ctypes.Structure):
    """router_t of router.c."""

    _fields_ = (
        ("h", c_void_p), ("norm_weight", c_void_p), ("scale", c_void_p),
        ("per_expert_scale", c_void_p), ("input", c_void_p), ("chosen", c_void_p),
        ("weight", c_void_p), ("top_k", c_int64), ("dtype", c_int), ("norm_dtype", c_int),
        ("scale_dtype", c_int), ("per_expert_dtype", c_int), ("eps", c_float), ("offset", c_float),
    )  # fmt: skip


class ExpertsArgs(ctypes.Structure):
    """experts_t of experts.c."""

    _fields_ = (
        ("x", c_void_p), ("chosen", c_void_p), ("weight", c_void_p), ("y", c_void_p),
        ("rows", c_int64), ("top_k", c_int64), ("experts", c_int64), ("dtype", c_int),
    )  # fmt: skip


def route(
    h: Tensor, norm_weight: Tensor, scale: Tensor, proj: Tensor, per_expert_scale: Tensor, *,
    top_k: int, eps: float, offset: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns (input, chosen, weight) of norm_router."""
    h, norm_weight, scale, proj, per_expert_scale = map(
        contiguous, (h, norm_weight, scale, proj, per_expert_scale)
    )
    shape = *h.shape[:-1], top_k
    inputs = torch.empty_like(h)
    chosen, weight = torch.empty(shape, dtype=torch.int32), torch.empty(shape, dtype=torch.float32)
    args = RouterArgs(
        pointer(h), pointer(norm_weight), pointer(scale), pointer(per_expert_scale),
        pointer(inputs), pointer(chosen), pointer(weight), top_k, DTYPES[h.dtype],
        DTYPES[norm_weight.dtype], DTYPES[scale.dtype], DTYPES[per_expert_scale.dtype], eps, offset,
    )  # fmt: skip
    rows = h.numel() // h.shape[-1]
    call("route", byref(args), byref(weight_args(Weight(proj))), rows, torch.get_num_threads())
    return inputs, chosen, weight


def few_rows(x: Tensor, gate_up: Weight, down: Weight, chosen: Tensor, weight: Tensor) -> Tensor:
    """Returns y of experts.py."""
    x, chosen, weight = map(contiguous, (x, chosen, weight))
    y, top_k = torch.empty_like(x), chosen.shape[-1]
    rows, dim = x.numel() // x.shape[-1], x.shape[-1]
    args = ExpertsArgs(
        pointer(x), pointer(chosen), pointer(weight), pointer(y), rows, top_k,
        down.shape[0] // dim, DTYPES[x.dtype],
    )  # fmt: skip
    weights = byref(weight_args(gate_up)), byref(weight_args(down))
    call("experts", byref(args), *weights, torch.get_num_threads())
    return y
