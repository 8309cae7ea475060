"""Decode attention: one new token a sequence, whose K and V join the cache.

eager, torch.compile and gemma_fast do all of it: the rotation, the write and the attention. The
other rivals only attend: they are given q rotated and the cache written, which is not timed. That
errs against gemma_fast. Every slot of the ring is visible, so nobody needs a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gemma_fast.benchmarks.kernels.attention import rotated
from gemma_fast.benchmarks.kernels.rotary import Tensors, angles
from gemma_fast.benchmarks.kernels.suite import (
    EAGER,
    OURS,
    OURS_ALONE,
    Call,
    Suite,
    alone,
    compiled,
)
from gemma_fast.benchmarks.measure.machine import Work
from gemma_fast.kernels.decode_attention import decode_attention, decode_attention_reference
from gemma_fast.kernels.rotary import rotary_write_reference


def inputs(
    device: torch.device, dtype: torch.dtype, b: int, depth: int, heads: int, n: int, d: int,
    window: int | None = None,
) -> Tensors:  # fmt: skip
    """qkv :: [b, heads + 2 n, d]; keys, values :: [b, n, slots, d], a ring of the window's length
    or of depth, to which the token at depth − 1 is still to be written; … ; the scale."""
    make: dict[str, Any] = {"device": device, "dtype": dtype}
    qkv = torch.randn(b, heads + 2 * n, d, **make)
    keys, values = torch.randn(2, b, n, min(depth, window or depth), d, **make)
    cos, sin = tables(depth, d, device)
    position = torch.full((b,), depth - 1, dtype=torch.int32, device=device)
    return qkv, keys, values, cos, sin, position, d**-0.5


@cache
def tables(depth: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos, sin :: [depth, d / 2]: all inputs share them, as all layers of a model do."""
    cos, sin = angles(depth, d, device)
    return cos[0], sin[0]


def work(
    itemsize: int, b: int, depth: int, heads: int, n: int, d: int, window: int | None = None
) -> Work:
    """Old K and V, qkv, cos and sin read; new K and V and out written. 4 FLOPs a channel, head and
    visible key."""
    visible = min(depth, window or depth)
    cache = 2 * b * n * visible * d  # all but the newest read, and that written
    values = cache + b * (heads + 2 * n) * d + b * heads * d
    return Work(values * itemsize + 4 * d, 4 * b * heads * d * visible)


def ours(*inputs: Any) -> Call:
    *tensors, scale = inputs
    b, n = tensors[1].shape[:2]
    tensors.append(torch.zeros(b * n, dtype=torch.int32, device=tensors[0].device))  # arrived
    return lambda: decode_attention(*tensors, scale=scale, prefetch=True)


def oracle(*inputs: Any) -> Tensor:
    *tensors, scale = inputs
    return decode_attention_reference(*tensors, scale=scale)


def written(
    qkv: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, position: Tensor
) -> Tensor:
    """q :: [b, heads, 1, d], rotated; K and V are written to the cache."""
    n = keys.shape[1]
    q, k, v = qkv.unsqueeze(1).split((qkv.shape[1] - 2 * n, n, n), dim=2)
    cos, sin = (x[position.long()].unsqueeze(1) for x in (cos, sin))
    rotary_write_reference(k, v, keys, values, cos, sin, position)
    return rotated(q, cos, sin).transpose(1, 2)


def attend(
    qkv: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, position: Tensor,
    scale: float,
) -> Tensor:  # fmt: skip
    """Products in the inputs' dtype, softmax in fp32, as in reference.py."""
    q = written(qkv, keys, values, cos, sin, position)
    b, heads, _, d = q.shape
    q = q.reshape(b, keys.shape[1], -1, d)  # [b, n, m, d]
    weights = (q @ keys.mT * scale).softmax(-1, dtype=torch.float32)
    return (weights.to(q.dtype) @ values).view(b, heads, d)


def sdpa(backend: SDPBackend) -> Callable[..., Call]:
    def provider(
        qkv: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, position: Tensor,
        scale: float,
    ) -> Call:  # fmt: skip
        q = written(qkv, keys, values, cos, sin, position)
        if backend == SDPBackend.EFFICIENT_ATTENTION:  # knows only one kv head for each query head
            group = q.shape[1] // keys.shape[1]
            keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
        grouped = q.shape[1] != keys.shape[1]

        def call() -> Tensor:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(
                    q, keys, values, scale=scale, enable_gqa=grouped
                )
            return out.squeeze(2)

        try:
            call()
        except RuntimeError as error:
            if "No available kernel" not in str(error) and "No viable backend" not in str(error):
                raise
            raise NotImplementedError("no kernel of this backend") from error
        return call

    return provider


def _sizes(*rows: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    names = ("b", "depth", "heads", "n", "d", "window")
    sizes = [dict(zip(names, row, strict=False)) for row in rows]
    return {
        f"b {x['b']}, depth {x['depth']}, {x['heads']}/{x['n']} heads, d {x['d']}"
        + (f", window {x['window']}" if "window" in x else ""): x
        for x in sizes
    }


DECODE_ATTENTION = Suite(
    name="decode_attention",
    about="Attention of one token over `depth`; query / kv heads. Rivals of eager only attend",
    yardstick=False,
    sizes=_sizes(
        (1, 2048, 8, 1, 256),
        (1, 8192, 8, 1, 256),
        (64, 4096, 8, 1, 256),
        (1, 8192, 4, 1, 256, 512),
    ),
    tiny=_sizes((1, 40, 4, 1, 32), (2, 24, 4, 2, 32), (1, 24, 4, 1, 32, 16)),
    inputs=inputs,
    oracle=oracle,
    work=work,
    tolerance={torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5},
    providers={
        EAGER: lambda *inputs: lambda: attend(*inputs),
        "torch.compile": lambda *inputs: lambda: compiled(attend)(*inputs),
        "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
        "SDPA efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
        OURS_ALONE: alone(ours),
        OURS: ours,
    },
)
