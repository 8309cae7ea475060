"""Suite of the router of Gemma 4 26B-A4B and what runs beside it: residual, norms, and gate and up
projection of the dense MLP."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_fast.benchmarks.kernels.geglu import eager as geglu_of
from gemma_fast.benchmarks.kernels.matvec import choices
from gemma_fast.benchmarks.kernels.rivals import torch_compiled
from gemma_fast.benchmarks.kernels.rmsnorm import EPS
from gemma_fast.benchmarks.kernels.suite import Call, Check, Size, Suite, Tuning
from gemma_fast.benchmarks.measure.machine import Work
from gemma_fast.benchmarks.measure.outcome import EAGER, OURS, OURS_ALONE
from gemma_fast.kernels.router import norm_router


def inputs(b: int, dim: int, out: int, experts: int, top_k: int, **make: Any) -> tuple[Any, ...]:
    """Returns x, residual :: [b, dim]; post_norm, norm :: [dim]; gate_up :: [out, dim];
    expert_norm, scale :: [dim]; proj :: [experts, dim]; per_expert_scale :: [experts]; top_k.

    The rows of proj are multiples of one vector, which is large in the residual, so logits are
    evenly spaced from -4 to 4. Then providers that round to 16 bits choose the same experts.
    """
    x, residual, direction = torch.randn(b + b + 1, dim, **make).split([b, b, 1])
    direction = direction.sign()
    gate_up = torch.randn(out, dim, **make) * dim**-0.5
    norms = [1 + torch.randn(dim, **make) / 4 for _ in range(4)]
    order = torch.randperm(experts, device=make["device"])
    levels = torch.linspace(-4, 4, experts, **make)[order]
    proj = levels[:, None] * direction * dim**-0.5
    post, norm, expert_norm, scale = norms
    per_expert = 1 + torch.rand(experts, **make)
    return (
        x, residual + 2 * direction, post, norm, gate_up, expert_norm, scale, proj, per_expert,
        top_k,
    )  # fmt: skip


def work(itemsize: int, b: int, dim: int, out: int, experts: int, top_k: int) -> Work:
    """Counts the weights, x and the residual, and the results: the residual, the experts' input,
    out / 2 columns of the MLP, and a weight and an index of 4 bytes for each chosen expert."""
    values = (out + experts + 4) * dim + experts + b * (4 * dim + out // 2)
    return Work(values * itemsize + 8 * b * top_k, 2 * b * (out + experts) * dim)


def formula(
    x: Tensor, residual: Tensor, post: Tensor, norm: Tensor, gate_up: Tensor, expert_norm: Tensor,
    scale: Tensor, proj: Tensor, per_expert: Tensor, top_k: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Returns the residual, the MLP's columns, the experts' input, and the weights of the chosen
    experts, which depend on the choice."""
    dim = x.shape[1]
    h = residual + F.rms_norm(x, (dim,), post, EPS)
    dense = geglu_of(F.linear(F.rms_norm(h, (dim,), norm, EPS), gate_up))
    router = F.rms_norm(h, (dim,), scale, EPS) * dim**-0.5
    p = F.linear(router, proj).softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))
    weight, chosen = p.topk(top_k)
    weight = weight / weight.sum(-1, keepdim=True) * per_expert[chosen]
    return h, dense, F.rms_norm(h, (dim,), expert_norm, EPS), weight


def eager(*given: Any) -> Call:
    return lambda: formula(*given)


def ours(*given: Any, pdl: bool = True) -> Call:
    *tensors, top_k = given
    tensors.append(torch.zeros(8, dtype=torch.int32, device=tensors[0].device))  # the counter

    def call() -> tuple[Tensor, ...]:
        found = norm_router(*tensors, top_k=top_k, eps=EPS, offset=0.0, pdl=pdl)
        return *found[:3], found[4]

    return call


def checked(*given: Any) -> Call:
    """As `ours`, with weights in the dtype of x."""
    call = ours(*given)

    def rounded() -> tuple[Tensor, ...]:
        *others, weight = call()
        return *others, weight.to(others[0].dtype)

    return rounded


def checked_formula(*given: Any) -> tuple[Tensor, ...]:
    *others, weight = formula(*given)
    return *others, weight.to(others[0].dtype)


def size(b: int, letter: str = "b") -> dict[str, Size]:
    """Returns the size of 26B-A4B for b rows."""
    sizes = {"b": b, "dim": 2816, "out": 4224, "experts": 128, "top_k": 8}
    return {f"2816 x 4224, {letter} {b}, 8 of 128": sizes}


TINY = {"b": 3, "dim": 64, "out": 48, "experts": 6, "top_k": 3}
NORM_ROUTER = Suite(
    name="norm_router",
    about="Residual, norms, router, and gate and up projection with GeGLU: Gemma 4 26B-A4B",
    yardstick=True,
    sizes=size(1) | size(8) | size(1024, "t"),
    tiny={"64 x 48, b 1, 3 of 6": TINY | {"b": 1}, "64 x 48, b 3, 3 of 6": TINY},
    inputs=inputs,
    oracle=formula,
    work=work,
    tuning=Tuning("norm_router", lambda size: {"BLOCK_E": (1, 2, 4), **choices(size)}),
    providers={
        EAGER: eager,
        "torch.compile": torch_compiled(formula),
        OURS_ALONE: partial(ours, pdl=False),
        OURS: ours,
    },
    # Weights are in float32, from logits of up to 4 in the dtype.
    tolerance={torch.bfloat16: 1e-2, torch.float16: 1.2e-3, torch.float32: 1e-5},
    float32=(3,),
)
SIZES = TINY | {"b": 1, "dim": 320}, size(1)["2816 x 4224, b 1, 8 of 128"]
ROUTER = Check("norm_router", inputs, checked_formula, checked, SIZES)
CHECKS = (
    ROUTER,
    ROUTER.resized("norm_router, 8 rows", b=8),
    ROUTER.resized("norm_router, 40 rows", b=40),
)
