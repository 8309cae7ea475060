"""Calls of the C kernels for a mixture of experts."""

import ctypes
from ctypes import byref, c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from gemma_fast.kernels.cpu.calls import (
    DTYPES,
    MAX_ROWS,
    call,
    contiguous,
    geglu,
    pointer,
    weight_args,
)
from gemma_fast.kernels.cpu.matmul import linear, packed_linear
from gemma_fast.kernels.packed import Weight

# With more rows for each expert, unpacking its weights and a library's matmul take less time.
FEW = 3
ROWS = 4096  # at once, because each row has top_k results of experts


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
    rows, slots = x.reshape(-1, dim), chosen.reshape(-1, top_k)
    count = down.shape[0] // dim
    if len(rows) <= MAX_ROWS or slots.numel() <= FEW * count:
        return _few_rows(x, gate_up, down, chosen, weight)
    parts = (part.split(ROWS) for part in (rows, slots, weight.reshape(-1, top_k)))
    return torch.cat([_many_rows(*part, gate_up, down) for part in zip(*parts, strict=True)]).view(
        x.shape
    )


def _few_rows(x: Tensor, gate_up: Weight, down: Weight, chosen: Tensor, weight: Tensor) -> Tensor:
    x, chosen, weight = map(contiguous, (x, chosen, weight))
    y = torch.empty_like(x)
    args = _experts_args(x, chosen, weight, y)
    weights = byref(weight_args(gate_up)), byref(weight_args(down))
    call("experts", byref(args), *weights, torch.get_num_threads())
    return y


def _many_rows(x: Tensor, chosen: Tensor, weight: Tensor, gate_up: Weight, down: Weight) -> Tensor:
    """Computes one expert after another, for the rows that chose it.

    Rounds to x.dtype: packed weights, gate and up, gelu(gate) * up, and each expert's result.
    """
    dim, top_k = x.shape[-1], chosen.shape[-1]
    pairs, count = chosen.flatten(), down.shape[0] // dim
    order = pairs.argsort(stable=True)  # a pair is a row and a slot
    row, place = order // top_k, torch.empty_like(order)
    place[order] = torch.arange(len(order))
    terms, start = torch.empty(len(order), dim, dtype=x.dtype), 0  # in the order of `order`
    for index, size in enumerate(pairs.bincount(minlength=count).tolist()):
        if size:
            stop = start + size
            hidden = _linear(x[row[start:stop]], _expert(gate_up, index, count))
            hidden = geglu(*hidden.chunk(2, dim=-1))
            terms[start:stop] = _linear(hidden, _expert(down, index, count))
            start = stop
    x, chosen, weight = map(contiguous, (x, chosen, weight))
    y = torch.empty_like(x)
    args = byref(_experts_args(x, chosen, weight, y))
    call("sum_terms", args, pointer(terms), pointer(place), dim, torch.get_num_threads())
    return y


def _experts_args(x: Tensor, chosen: Tensor, weight: Tensor, y: Tensor) -> ExpertsArgs:
    dim, top_k = x.shape[-1], chosen.shape[-1]
    return ExpertsArgs(
        pointer(x), pointer(chosen), pointer(weight), pointer(y), x.numel() // dim, top_k,
        DTYPES[x.dtype],
    )  # fmt: skip


def _expert(weight: Weight, index: int, count: int) -> Weight:
    rows = weight.shape[0] // count
    return weight.rows(index * rows, (index + 1) * rows)


def _linear(x: Tensor, weight: Weight) -> Tensor:
    return packed_linear(x, weight) if weight.scale is not None else linear(x, weight.data)
