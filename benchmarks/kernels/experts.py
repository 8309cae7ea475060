"""Suites of the chosen experts of Gemma 4 26B-A4B: for a decode step, with the dense MLP's down
projection beside them, and for prompts.

A size "b 8, 64 of 128" has 8 rows, which choose 64 different experts of 128 together: the bytes are
those of these experts. Each of them is chosen equally often. Providers "transformers …" are
transformers' Gemma4TextExperts with that experts implementation.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_fast.benchmarks.kernels.geglu import eager as geglu_of
from gemma_fast.benchmarks.kernels.packed import packed
from gemma_fast.benchmarks.kernels.suite import Call, Check, Choices, Size, Suite, Tuning
from gemma_fast.benchmarks.measure.machine import Work
from gemma_fast.benchmarks.measure.outcome import EAGER, OURS, OURS_ALONE
from gemma_fast.kernels.experts import experts as op
from gemma_fast.kernels.packed import PackedWeight

BITS_16 = 16  # weights in the dtype of x
GROUP = 32  # columns with one scale, in packed weights
# Rivals round gate and up, the GELU, its product with up, and the result of each expert.
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}


def inputs(
    b: int, dim: int, width: int, experts: int, top_k: int, used: int, ffn: int, bits: int,
    **make: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """Returns x :: [b, dim]; gate_up :: [experts * 2 * width, dim]; down :: [experts * dim, width];
    chosen, weight :: [b, top_k]; dense :: [b, ffn] and dense_down :: [dim, ffn], or None if ffn is
    0.

    used: number of different experts that the rows choose together, at least top_k
    """

    def matrix(out: int, columns: int) -> Any:
        if bits != BITS_16:
            return packed(out, columns, bits, GROUP, make["device"])
        return torch.randn(out, columns, **make) * columns**-0.5

    x, device = torch.randn(b, dim, **make), make["device"]
    pool = torch.randperm(experts, device=device)[:used].int()
    chosen = pool[torch.arange(b * top_k, device=device) % used].view(b, top_k)
    weight = torch.rand(b, top_k, device=device) + 0.5
    weight = weight / weight.sum(-1, keepdim=True)
    dense = (torch.randn(b, ffn, **make), matrix(dim, ffn)) if ffn else (None, None)
    return x, matrix(experts * 2 * width, dim), matrix(experts * dim, width), chosen, weight, *dense


def work(
    itemsize: int, b: int, dim: int, width: int, experts: int, top_k: int, used: int, ffn: int,
    bits: int,
) -> Work:  # fmt: skip
    """Counts the weights of the used experts and of the dense projection, x and dense, the results,
    and 8 bytes for each choice."""
    number = bits / 8 + 2 / GROUP if bits != BITS_16 else itemsize  # of a weight, in bytes
    values = b * (2 * dim + bool(ffn) * (ffn + dim))
    size = number * (3 * used * width + ffn) * dim + itemsize * values + 8 * b * top_k
    return Work(size, 2 * b * dim * (3 * top_k * width + ffn))


def unpacked(weight: Any, dtype: torch.dtype) -> Tensor:
    return weight.weight.unpack(dtype) if isinstance(weight, PackedWeight) else weight


def formula(
    x: Tensor, gate_up: Any, down: Any, chosen: Tensor, weight: Tensor, dense: Tensor | None,
    dense_down: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Computes one expert after another, for the rows that chose it, as transformers' eager code
    does. Sums over the experts are in float32 or float64."""
    gate_up, down = unpacked(gate_up, x.dtype), unpacked(down, x.dtype)
    gate_up = gate_up.unflatten(0, (len(down) // x.shape[1], -1))  # [experts, 2 * width, dim]
    down = down.unflatten(0, (len(gate_up), -1))  # [experts, dim, width]
    y = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    for expert in chosen.unique().tolist():
        row, slot = torch.where(chosen == expert)
        hidden = geglu_of(F.linear(x[row], gate_up[expert]))
        y.index_add_(0, row, F.linear(hidden, down[expert]).to(y.dtype) * weight[row, slot, None])
    return y.to(x.dtype), *beside(dense, dense_down)


def beside(dense: Tensor | None, dense_down: Any) -> tuple[Tensor, ...]:
    """Returns the result of the dense projection, if there is one."""
    return () if dense is None else (F.linear(dense, unpacked(dense_down, dense.dtype)),)


def eager(x: Tensor, gate_up: Any, down: Any, *others: Any) -> Call:
    weights = unpacked(gate_up, x.dtype), unpacked(down, x.dtype)
    return lambda: formula(x, *weights, *others)


def of_transformers(kind: str, *given: Any) -> Call:
    """Returns a call of transformers' experts with the experts implementation `kind`."""
    from transformers import Gemma4TextConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts

    x, gate_up, down, chosen, weight, *dense = given
    gate_up, down, dim = unpacked(gate_up, x.dtype), unpacked(down, x.dtype), x.shape[1]
    config = Gemma4TextConfig(
        enable_moe_block=True, num_experts=len(down) // dim, top_k_experts=chosen.shape[1],
        hidden_size=dim, moe_intermediate_size=down.shape[1],
    )  # fmt: skip
    config._experts_implementation = kind
    with torch.device("meta"):
        module = Gemma4TextExperts(config)
    for name, matrix in (("gate_up_proj", gate_up), ("down_proj", down)):
        stacked = matrix.unflatten(0, (config.num_experts, -1))
        setattr(module, name, torch.nn.Parameter(stacked, requires_grad=False))
    index = chosen.long()
    return lambda: (module(x, index, weight), *beside(*dense))


def ours(*given: Any, pdl: bool = True) -> Call:
    count = 1 if given[-1] is None else 2
    return lambda: op(*given, pdl=pdl)[:count]


def decode_choices(size: Size) -> Choices:
    return {"BLOCK_N": (4, 8, 16), "STAGES": (3, 4, 6), "num_warps": (4, 8)}


def prompt_choices(size: Size) -> Choices:
    return {"BLOCK_M": (16, 32, 64, 128), "BLOCK_N": (64, 128), "num_warps": (4, 8)}


def sizes(bits: int, ffn: int, *counts: tuple[int, int], letter: str = "b") -> dict[str, Size]:
    """Returns the sizes of 26B-A4B for counts of (rows, experts that they choose)."""
    same = {"dim": 2816, "width": 704, "experts": 128, "top_k": 8, "ffn": ffn, "bits": bits}
    return {f"{letter} {b}, {used} of 128": same | {"b": b, "used": used} for b, used in counts}


def tiny(bits: int, ffn: int, *counts: tuple[int, int]) -> dict[str, Size]:
    same = {"dim": 64, "width": 32, "experts": 6, "top_k": 3, "ffn": ffn, "bits": bits}
    return {f"b {b}, {used} of 6": same | {"b": b, "used": used} for b, used in counts}


def suite(name: str, about: str, bits: int, decode: bool = True) -> Suite:
    ffn = 2112 if decode else 0
    counts = ((1, 8), (8, 64), (8, 8)) if bits == BITS_16 else ((1, 8), (8, 64))
    prompts = ((512, 128), (2048, 128), (8192, 128), (2048, 8))
    return Suite(
        name=name,
        about=f"{about}: Gemma 4 26B-A4B",
        yardstick=True,
        sizes=sizes(bits, ffn, *counts) if decode else sizes(bits, ffn, *prompts, letter="t"),
        tiny=tiny(bits, 96, (1, 3), (2, 6)) if decode else tiny(bits, 0, (9, 6), (9, 3)),
        inputs=inputs,
        oracle=formula,
        work=work,
        tolerance=TOLERANCE,
        tuning=Tuning("experts_gate_up", decode_choices)
        if decode
        else Tuning("grouped_gate_up", prompt_choices),
        providers={
            EAGER: eager,
            "transformers batched_mm": partial(of_transformers, "batched_mm"),
            "transformers grouped_mm": partial(of_transformers, "grouped_mm"),
            OURS_ALONE: partial(ours, pdl=False),
            OURS: ours,
        },
    )


EXPERTS = suite("experts", "Chosen experts of a decode step, and the dense down projection", 16)
EXPERTS_INT8 = suite("experts_int8", "The same with weights in 8 bits", 8)
EXPERTS_INT4 = suite("experts_int4", "The same with weights in 4 bits", 4)
EXPERTS_PROMPT = suite("experts_prompt", "Experts of a prompt's tokens", 16, decode=False)
EXPERTS_PROMPT_INT4 = suite(
    "experts_prompt_int4", "Experts of a prompt's tokens, in 4 bits", 4, decode=False
)


def check(name: str, bits: int, b: int, used: int, ffn: int = 96) -> Check:
    """Returns a check of `b` rows that choose `used` experts: of 6, or of 128 on a GPU."""
    small, large = tiny(bits, ffn, (b, used)), sizes(bits, 22 * ffn, (b, max(used, 8)))
    return Check(name, inputs, formula, ours, (*small.values(), *large.values()))


CHECKS = (
    check("experts", 16, 1, 3),
    check("experts, 8 rows", 16, 8, 6),
    check("experts, 40 rows", 16, 40, 6, ffn=0),
    check("experts, int8, 8 rows", 8, 8, 5),
    check("experts, int4", 4, 1, 3),
    check("experts, int4, 40 rows, 3 experts", 4, 40, 3, ffn=0),
)
