"""Calls of the C kernels for attention."""

import ctypes
from ctypes import byref, c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from gemma_fast.kernels.cpu.calls import (
    DTYPES,
    call,
    contiguous,
    head_args,
    pointer,
    rotary,
)


class DecodeArgs(ctypes.Structure):
    """decode_t of attention.c."""

    _fields_ = (
        ("qkv", c_void_p), ("keys", c_void_p), ("values", c_void_p), ("cos", c_void_p),
        ("sin", c_void_p), ("position", c_void_p), ("out", c_void_p), ("b", c_int64),
        ("n", c_int64), ("m", c_int64), ("slots", c_int64), ("window", c_int64),
        ("batch_stride", c_int64), ("head_stride", c_int64), ("slot_stride", c_int64),
        ("scale", c_float), ("softcap", c_float), ("new_keys", c_int), ("new_values", c_int),
    )  # fmt: skip


class PromptArgs(ctypes.Structure):
    """prompt_t of prompt_attention.c."""

    _fields_ = (
        ("q", c_void_p), ("keys", c_void_p), ("values", c_void_p), ("query_offset", c_void_p),
        ("left_padding", c_void_p), ("out", c_void_p), ("b", c_int64), ("n", c_int64),
        ("m", c_int64), ("t", c_int64), ("dim", c_int64), ("slots", c_int64), ("window", c_int64),
        ("batch_stride", c_int64), ("head_stride", c_int64), ("slot_stride", c_int64),
        ("scale", c_float), ("softcap", c_float), ("dtype", c_int),
    )  # fmt: skip


def decode_attention(
    qkv: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, position: Tensor,
    q_norm: Tensor | None, k_norm: Tensor | None, *, queries: int, scale: float, heads: str,
    v_norm: bool, offset: float, window: int | None, softcap: float | None, eps: float,
) -> Tensor:  # fmt: skip
    """As the op of this name, for `queries` query heads."""
    (b, _, d), (n, slots) = qkv.shape, keys.shape[1:3]
    qkv, cos, sin, position = map(contiguous, (qkv, cos, sin, position))
    out = torch.empty(b, queries, d, dtype=qkv.dtype)
    args = DecodeArgs(
        pointer(qkv), pointer(keys), pointer(values), pointer(cos), pointer(sin),
        pointer(position), pointer(out), b, n, queries // n, slots, window or 0,
        *keys.stride()[:3], scale, softcap or 0.0, "k" in heads, "v" in heads,
    )  # fmt: skip
    query, key = (head_args(qkv, weight, eps, offset) for weight in (q_norm, k_norm))
    value = head_args(qkv, None, eps, offset, v_norm)
    threads = torch.get_num_threads()
    call("decode_attention", byref(args), byref(query), byref(key), byref(value), threads)
    return out


def attention(
    q: Tensor, keys: Tensor, values: Tensor, cos: Tensor | None, sin: Tensor | None,
    query_offset: Tensor, norm_weight: Tensor | None, *, scale: float,
    left_padding: Tensor | None, window: int | None, softcap: float | None, eps: float,
    offset: float,
) -> Tensor:  # fmt: skip
    """As the op of this name."""
    b, t, heads, d = q.shape
    n, slots = keys.shape[1:3]
    rotated = torch.empty(b, heads, t, d, dtype=q.dtype)
    rotary(q, rotated, cos, sin, norm_weight, eps=eps, offset=offset)
    out = torch.empty(b, t, heads, d, dtype=q.dtype)
    query_offset = contiguous(query_offset)
    left_padding = None if left_padding is None else contiguous(left_padding)
    args = PromptArgs(
        pointer(rotated), pointer(keys), pointer(values), pointer(query_offset),
        pointer(left_padding), pointer(out), b, n, heads // n, t, d, slots, window or 0,
        *keys.stride()[:3], scale, softcap or 0.0, DTYPES[q.dtype],
    )  # fmt: skip
    call("prompt_attention", byref(args), torch.get_num_threads())
    return out
