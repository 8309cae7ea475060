"""Suites of matmuls with weights in 8 and 4 bits: for a decode step, and for prompts.

`eager` is F.linear with the unpacked weight, so its bytes are those of 16-bit weights. All other
providers compute with the same integers and scales. Those of torchao are PyTorch's own kernels,
which torchao's int4 and int8 weight-only quantization call.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_fast.benchmarks.kernels import matvec
from gemma_fast.benchmarks.kernels.rivals import compiled, plain
from gemma_fast.benchmarks.kernels.suite import Call, Check, Choices, Size, Suite, Tuning
from gemma_fast.benchmarks.measure.machine import Work
from gemma_fast.benchmarks.measure.outcome import EAGER, OURS, OURS_ALONE
from gemma_fast.kernels.embed import embed
from gemma_fast.kernels.matvec import linear
from gemma_fast.kernels.packed import PackedRows, PackedWeight, Packing

ROW = 0  # group: one scale per row


def packed(out: int, dim: int, bits: int, group: int, device: Any) -> PackedWeight:
    """Returns a random symmetric weight, such that outputs are about normal(0, 1). Its scales are
    in bf16, because the rivals' are."""
    packing = Packing(bits, group or dim, False, torch.bfloat16)
    with torch.device(device):
        weight, limit = PackedWeight((out, dim), packing), 1 << (bits - 1)
        values = torch.randint(-limit, limit, (out, dim), dtype=torch.int8)
        scale = (0.5 + torch.rand(out, dim // packing.group)) * (1.7 / limit * dim**-0.5)
    weight.write(0, PackedRows(values, scale.bfloat16(), None))
    return weight


def inputs(
    b: int, dim: int, out: int, bits: int, group: int, **make: Any
) -> tuple[Tensor, PackedWeight]:
    """Returns x :: [b, dim] and the packed weight [out, dim]."""
    return torch.randn(b, dim, **make), packed(out, dim, bits, group, make["device"])


def work(itemsize: int, b: int, dim: int, out: int, bits: int, group: int) -> Work:
    """Counts the bytes of values, scales, x and y, and the FLOPs of the matmul."""
    weight = out * dim * bits // 8 + 2 * out * dim // (group or dim)
    return Work(weight + (b * dim + b * out) * itemsize, 2 * b * out * dim)


def formula(x: Tensor, weight: PackedWeight) -> Tensor:
    return F.linear(x, weight.weight.unpack(x.dtype))


def eager(x: Tensor, weight: PackedWeight) -> Call:
    unpacked = weight.weight.unpack(x.dtype)
    return lambda: F.linear(x, unpacked)


def torchao_int4(x: Tensor, weight: PackedWeight) -> Call:
    if weight.packing.bits != 4 or x.dtype != torch.bfloat16 or not x.is_cuda:
        raise NotImplementedError("int4 weights and bf16 on a GPU only")
    nibbles = (weight.weight.values() + 8).to(torch.uint8)  # [out, dim]; even columns are high
    matrix = torch.ops.aten._convert_weight_to_int4pack(nibbles[:, ::2] << 4 | nibbles[:, 1::2], 8)
    scale = weight.scale.T.contiguous()  # [groups, out]
    factors = torch.stack((scale, torch.zeros_like(scale)), dim=2)  # [groups, out, 2]
    return lambda: torch.ops.aten._weight_int4pack_mm(x, matrix, weight.packing.group, factors)


def torchao_int8(x: Tensor, weight: PackedWeight) -> Call:
    if weight.packing.bits != 8 or weight.scale.shape[1] > 1:
        raise NotImplementedError("int8 weights with one scale per row only")
    scale = weight.scale[:, 0].to(x.dtype)
    return partial(compiled(scaled_matmul), x, weight.data, scale)


def scaled_matmul(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    return F.linear(x, values.to(x.dtype)) * scale


def gemlite(x: Tensor, weight: PackedWeight) -> Call:
    from gemlite.core import TORCH_TO_DTYPE, GemLiteLinear

    (out, dim), (bits, group, *_) = weight.shape, weight.packing
    kind, zero = TORCH_TO_DTYPE[x.dtype], 1 << (bits - 1)
    matmul = GemLiteLinear(
        bits, group_size=group, in_features=dim, out_features=out, input_dtype=kind,
        output_dtype=kind,
    )  # fmt: skip
    values = (weight.weight.values().int() + zero).to(torch.uint8)
    scale = weight.scale.to(x.dtype)
    matmul.pack(values, scale, torch.full_like(scale, zero), None)
    return lambda: matmul(x)


def bitsandbytes(x: Tensor, weight: PackedWeight) -> Call:
    import bitsandbytes  # noqa: F401, registers the op

    bits, group, *_ = weight.packing
    if bits != 4 or len(x) > 1 or group not in (64, 128):
        raise NotImplementedError("one row, and int4 weights in groups of 64 or 128 only")
    code = torch.arange(-8, 8, dtype=torch.float32, device=x.device)  # in place of nf4's 16 numbers
    nibbles = (weight.weight.values() + 8).to(torch.uint8).view(-1, 2)  # the first one is high
    matrix = nibbles[:, :1] << 4 | nibbles[:, 1:]  # [out * dim / 2, 1]
    scale = weight.scale.float().flatten()
    gemv = torch.ops.bitsandbytes.gemv_4bit
    return lambda: gemv(x, matrix, list(weight.shape), scale, code, group)


def prompt_choices(size: Size) -> Choices:
    return {
        "BLOCK_M": (128, 256), "BLOCK_N": (64, 128), "BLOCK_K": (64, 128), "num_warps": (4, 8),
    }  # fmt: skip


def suite(name: str, about: str, sizes: dict[str, Size], **options: Any) -> Suite:
    rivals = {"torchao int4": torchao_int4, "torchao int8": torchao_int8, "GemLite": gemlite}
    return Suite(
        name=name, about=about, yardstick=True, sizes=sizes, inputs=inputs, oracle=formula,
        work=work, **options,
        providers={
            EAGER: eager, **rivals, "bitsandbytes": bitsandbytes,
            OURS_ALONE: plain(partial(linear, pdl=False)), OURS: plain(partial(linear, pdl=True)),
        },
    )  # fmt: skip


def named(bits: int, group: int, dim: int, out: int, b: int, letter: str = "b") -> dict[str, Size]:
    scales = f"group {group}" if group else "a scale per row"
    size = {"b": b, "dim": dim, "out": out, "bits": bits, "group": group}
    return {f"{dim} x {out}, {letter} {b}, int{bits}, {scales}": size}


# Down, output, and gate and up projection of Gemma 2B; gate and up of Gemma 4 E4B
SHAPES = (16384, 2048), (2048, 2048), (2048, 32768), (2560, 20480)
INT4 = suite(
    "linear_int4",
    "Matmul [b, dim] x [dim, out] with weights in 4 bits: Gemma 2B, Gemma 4 E4B",
    {
        name: size
        for group, shapes in ((32, SHAPES), (128, SHAPES[2:3]))
        for shape in shapes
        for b in (1, 8)
        for name, size in named(4, group, *shape, b).items()
    },
    tiny=named(4, 32, 64, 48, 1) | named(4, 64, 128, 24, 3),
    tuning=Tuning("matvec", matvec.choices),
)
INT8 = suite(
    "linear_int8",
    "Matmul [b, dim] x [dim, out] with weights in 8 bits: Gemma 2B, Gemma 4 E4B",
    {
        name: size
        for group, shapes in ((32, SHAPES), (ROW, SHAPES[2:3]))
        for shape in shapes
        for b in (1, 8)
        for name, size in named(8, group, *shape, b).items()
    },
    tiny=named(8, 32, 64, 48, 1) | named(8, ROW, 48, 24, 3),
    tuning=Tuning("matvec", matvec.choices),
)
PROMPTS = suite(
    "linear_packed_prompt",
    "Matmul of prompts with weights in 4 and 8 bits: gate and up projection of Gemma 2B",
    {
        name: size
        for bits, group, rows in ((4, 32, (16, 512, 4096)), (8, ROW, (16, 2048)))
        for m in rows
        for name, size in named(bits, group, 2048, 32768, m, "m").items()
    },
    tiny=named(4, 32, 64, 48, 9, "m") | named(8, 32, 64, 48, 17, "m"),
    tuning=Tuning("packed_linear", prompt_choices),
)


def embed_inputs(rows: int, dim: int, bits: int, **make: Any) -> tuple[Tensor, PackedWeight, Any]:
    """Returns ids :: [1, rows], a packed table of 99 rows, and Gemma's scale in the dtype."""
    ids = torch.randint(99, (1, rows), device=make["device"])
    return ids, packed(99, dim, bits, 32, make["device"]), torch.tensor(dim**0.5, **make)


def embed_formula(ids: Tensor, table: PackedWeight, scale: Tensor) -> Tensor:
    return F.embedding(ids, table.weight.unpack(scale.dtype)) * scale


def embed_ours(ids: Tensor, table: Any, scale: Tensor) -> Call:
    factor = table.shape[1] ** 0.5
    return lambda: embed(ids, table, factor, dtype=scale.dtype, pdl=True)


EMBED = Check(
    "embed, int4", embed_inputs, embed_formula, embed_ours,
    ({"rows": 3, "dim": 320, "bits": 4}, {"rows": 64, "dim": 2304, "bits": 4}),
)  # fmt: skip
CHECKS = (EMBED, EMBED.resized("embed, int8", bits=8))  # those of matmuls are in packed_matvec.py
