"""Checks of what only Gemma 4 uses: norms without `1 +`, the layer scalar, the per-layer gate, and
attention whose values are its keys, or whose keys and values an earlier layer wrote."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_fast.benchmarks.kernels import attention, decode_attention
from gemma_fast.benchmarks.kernels.matvec import MATRIX
from gemma_fast.benchmarks.kernels.rivals import plain
from gemma_fast.benchmarks.kernels.rmsnorm import EPS, ROWS
from gemma_fast.benchmarks.kernels.rotary import Tensors, norm_and_rotate
from gemma_fast.benchmarks.kernels.suite import Call, Check
from gemma_fast.kernels.decode_attention import decode_attention as decode
from gemma_fast.kernels.matvec import norm_linear
from gemma_fast.kernels.rmsnorm import add_rms_norm


def norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def add_inputs(rows: int, dim: int, **make: Any) -> Tensors:
    """Returns x, residual :: [rows, dim]; weight, post_weight :: [dim]; layer_scalar :: [1, 1]."""
    tensors = [torch.randn(*shape, **make) for shape in [(rows, dim)] * 2 + [(dim,)] * 2]
    return *tensors, torch.rand(1, 1, **make) + 0.5


def add_formula(
    x: Tensor, residual: Tensor, weight: Tensor, post: Tensor, scalar: Tensor
) -> tuple[Tensor, Tensor]:
    h = (residual + norm(x, post)) * scalar
    return norm(h, weight), h


def add_ours(x: Tensor, residual: Tensor, weight: Tensor, post: Tensor, scalar: Tensor) -> Call:
    given = x, residual, weight, post
    return lambda: add_rms_norm(*given, EPS, offset=0.0, layer_scalar=scalar.view(1))


def gate_inputs(b: int, dim: int, out: int, **make: Any) -> Tensors:
    """Returns x, residual :: [b, dim]; post_weight :: [dim]; weight :: [out, dim]; up :: [b, out],
    the token's per-layer inputs."""
    x, residual = torch.randn(2, b, dim, **make)
    weight = torch.randn(out, dim, **make) * dim**-0.5
    return x, residual, torch.randn(dim, **make), weight, torch.randn(b, out, **make)


def gate_formula(
    x: Tensor, residual: Tensor, post: Tensor, weight: Tensor, up: Tensor
) -> tuple[Tensor, Tensor]:
    h = residual + norm(x, post)
    return F.gelu(F.linear(h, weight), approximate="tanh") * up, h


def gate(x: Tensor, residual: Tensor, post: Tensor, weight: Tensor, up: Tensor) -> Any:
    return norm_linear(x, residual, None, post, weight, up=up, eps=EPS, offset=0.0, pdl=True)


def decode_inputs(heads: int, n: int, has: str, **sizes: Any) -> Tensors:
    """Returns the inputs of decode_attention with norms, whose input has only the heads `has`."""
    qkv, *tensors, options = decode_attention.inputs(heads=heads, n=n, norm=True, **sizes)
    q_norm, k_norm = (1 + weight for weight in tensors[-2:])
    qkv = qkv[:, : heads + n * (has == "qk")].contiguous()
    return qkv, *tensors[:-2], q_norm, k_norm if has == "qk" else None, options


def decode_formula(*given: Any) -> Tensor:
    """As decode_attention.formula. Without k_norm, the ring has the token's keys and values."""
    q, keys, values, cos, sin, position, q_weight, k_weight, options = given
    q, cos, sin = q.unsqueeze(1), *(x[position.long()].unsqueeze(1) for x in (cos, sin))
    if k_weight is not None:
        n, slot = keys.shape[1], int(position[0]) % keys.shape[2]
        q, k = q[:, :, :-n], q[:, :, -n:]
        keys[:, :, slot] = norm_and_rotate(norm(k, k_weight), None, cos, sin).squeeze(1)
        values[:, :, slot] = norm(k).squeeze(1)
    q = norm_and_rotate(norm(q, q_weight), None, cos, sin)
    hidden = torch.zeros(1, keys.shape[2], dtype=torch.bool, device=q.device)
    return attention.attend(q, keys, values, hidden, options).squeeze(1)


def decode_ours(*given: Any) -> Call:
    qkv, keys, values, cos, sin, position, q_norm, k_norm, options = given
    heads = "q" if k_norm is None else "qk"
    return partial(
        decode, qkv, keys, values, cos, sin, position, decode_attention.zero_counter(keys), q_norm,
        k_norm, heads=heads, v_norm=True, offset=0.0, eps=EPS, pdl=True, **options,
    )  # fmt: skip


SIZES = (
    {"b": 2, "depth": 150, "heads": 4, "n": 2, "d": 64},
    {"b": 2, "depth": 4000, "heads": 8, "n": 1, "d": 512},
)
KEYS_ARE_VALUES = Check(
    "decode_attention, K = V", decode_inputs, decode_formula, decode_ours,
    [size | {"has": "qk"} for size in SIZES],
)  # fmt: skip
CHECKS = (
    Check("add_rms_norm, layer scalar", add_inputs, add_formula, add_ours, ROWS),
    Check("norm_linear, per-layer gate", gate_inputs, gate_formula, plain(gate), MATRIX),
    KEYS_ARE_VALUES,
    KEYS_ARE_VALUES.resized("decode_attention, only queries", has="q"),
    attention.CAUSAL.resized("attention, head dim 512", d=512),
)
