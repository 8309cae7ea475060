"""Calls of the C kernels for a mixture of experts."""

import ctypes
from ctypes import byref, c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from gemma_fast.kernels.cpu.calls import (
    DTYPES,
    call,
    contiguous,
    geglu,
    max_rows,
    pointer,
    weight_args,
)
from gemma_fast.kernels.cpu.matmul import linear, packed_linear
from gemma_fast.kernels.packed import Weight

# With more rows for each expert, unpacking its weights and a library's matmul take less time.
FEW, FEW_PACKED = 4, 16


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
        ("rows", c_int64), ("top_k", c_int64), ("dtype", c_int),
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


def experts(x: Tensor, gate_up: Weight, down: Weight, chosen: Tensor, weight: Tensor) -> Tensor:
    """Returns y of experts.py."""
    assert chosen.dtype == torch.int32 and weight.dtype == torch.float32
    dim, top_k = x.shape[-1], chosen.shape[-1]
    rows, count = x.numel() // dim, down.shape[0] // dim
    low, high = map(int, chosen.aminmax()) if chosen.numel() else (0, 0)
    assert low >= 0 and high < count, f"chosen is {low} … {high}, but {count=}"
    few = rows * top_k <= (FEW if gate_up.scale is None else FEW_PACKED) * count
    x, chosen, weight = map(contiguous, (x, chosen, weight))
    y = torch.empty_like(x)
    args = ExpertsArgs(
        pointer(x), pointer(chosen), pointer(weight), pointer(y), rows, top_k, DTYPES[x.dtype]
    )  # fmt: skip
    threads = torch.get_num_threads()
    if few or rows <= max_rows(x.dtype, gate_up):
        weights = byref(weight_args(gate_up)), byref(weight_args(down))
        call("experts", byref(args), *weights, threads)
        return y
    terms, place = _terms(x.view(rows, dim), chosen.view(rows, top_k), gate_up, down)
    call("sum_terms", byref(args), pointer(terms), pointer(place), dim, threads)
    return y


def _terms(x: Tensor, chosen: Tensor, gate_up: Weight, down: Weight) -> tuple[Tensor, Tensor]:
    """Returns the results of the chosen experts, sorted by expert :: [pairs, dim], and for each
    pair of a row and a slot its place among them :: [pairs]. Computes one expert after another.

    Rounds to x.dtype: packed weights, gate and up, gelu(gate) * up, and the results.
    """
    (rows, dim), top_k, count = x.shape, chosen.shape[1], down.shape[0] // x.shape[1]
    pairs = rows * top_k
    order = chosen.flatten().argsort(stable=True)  # [pairs]
    place = torch.empty_like(order)
    place[order] = torch.arange(pairs)
    terms, row, start = torch.empty(pairs, dim, dtype=x.dtype), order // top_k, 0
    for index, size in enumerate(chosen.flatten().bincount(minlength=count).tolist()):
        if size:
            stop = start + size
            hidden = _linear(x[row[start:stop]], gate_up.one_of(count, index))
            hidden = geglu(*hidden.chunk(2, dim=-1))
            terms[start:stop] = _linear(hidden, down.one_of(count, index))
            start = stop
    return terms, place


def _linear(x: Tensor, weight: Weight) -> Tensor:
    return packed_linear(x, weight) if weight.scale is not None else linear(x, weight.data)
