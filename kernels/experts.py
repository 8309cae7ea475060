"""The chosen experts of a mixture of experts, and beside them the end of the dense MLP.

    y       = sum over i of weight[i] * expert(chosen[i])
    expert  = (gelu(gate) * up) @ downᵀ, with gate and up the halves of x @ gate_upᵀ
    dense_y = dense @ dense_down_projᵀ

x               :: [..., dim], bf16 | fp16 | fp32: the experts' input
gate_up_proj    :: [experts * 2 * width, dim], x.dtype, or packed (packed.py); for each expert,
                   gate then up
down_proj       :: [experts * dim, width], x.dtype, or packed
chosen          :: [..., top_k], int32, each from 0 to experts - 1; weight :: [..., top_k], fp32
dense           :: [..., ffn], x.dtype, or None
dense_down_proj :: [dim, ffn], x.dtype, or packed, or None
y, dense_y      :: [..., dim], x.dtype

gelu(gate) * up is rounded to x.dtype. Sums over the experts are in fp32, in an order that depends
on the shapes only.
Bound by memory for few rows: bytes = those of the chosen experts. Walk-through step: MLP.
"""

import torch
from torch import Tensor

from gemma_fast.kernels._expert_matvec import Routed, expert_matvec
from gemma_fast.kernels._op import op
from gemma_fast.kernels.cpu import calls
from gemma_fast.kernels.cpu import experts as cpu
from gemma_fast.kernels.cpu.replay import recorder
from gemma_fast.kernels.geglu import geglu_reference
from gemma_fast.kernels.grouped_experts import grouped_experts
from gemma_fast.kernels.launch import runs_triton
from gemma_fast.kernels.matvec import is_matvec, linear
from gemma_fast.kernels.packed import Weight


def experts_reference(
    x: Tensor, gate_up_proj: Weight, down_proj: Weight, chosen: Tensor, weight: Tensor
) -> Tensor:
    """Computes one expert after another, for the rows that chose it."""
    dim, top_k = x.shape[-1], chosen.shape[-1]
    count = down_proj.shape[0] // dim
    rows, slots = x.reshape(-1, dim).float(), chosen.reshape(-1, top_k)
    y = torch.zeros(len(rows), top_k, dim, device=x.device)
    for index in slots.unique().tolist():
        row, slot = (slots == index).nonzero(as_tuple=True)
        weights = gate_up_proj.one_of(count, index), down_proj.one_of(count, index)
        gate_up, down = (w.unpack(torch.float32) for w in weights)
        hidden = geglu_reference(*(rows[row] @ gate_up.T).chunk(2, dim=-1)).to(x.dtype)
        y[row, slot] = hidden.float() @ down.T
    y *= weight.reshape(-1, top_k, 1)
    return y.sum(1).to(x.dtype).view(x.shape)


def _check(
    x: Tensor, gate_up: Weight, down: Weight, chosen: Tensor, weight: Tensor,
    dense: Tensor | None, dense_down: Weight | None,
) -> None:  # fmt: skip
    """Asserts that shapes and dtypes fit together."""
    dim, width, slots = x.shape[-1], down.shape[1], (*x.shape[:-1], chosen.shape[-1])
    count = down.shape[0] // dim
    assert gate_up.shape == (count * 2 * width, dim), f"{gate_up.shape=}, {count=}, {width=}"
    assert down.shape == (count * dim, width), f"{down.shape=}, {tuple(x.shape)=}"
    assert chosen.shape == weight.shape == slots, f"{chosen.shape=}, {weight.shape=}"
    assert chosen.dtype == torch.int32 and weight.dtype == torch.float32
    for part in (gate_up, down, *(() if dense_down is None else (dense_down,))):
        assert part.scale is not None or part.data.dtype == x.dtype, f"{part.data.dtype=}"
    assert (dense is None) == (dense_down is None), "give dense and dense_down_proj, or neither"
    if dense is not None and dense_down is not None:
        assert dense_down.shape == (dim, dense.shape[-1]), f"{dense_down.shape=}, {dense.shape=}"
        assert dense.shape[:-1] == x.shape[:-1] and dense.dtype == x.dtype, f"{dense.shape=}"


def _fake(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, chosen: Tensor, weight: Tensor,
    dense: Tensor | None = None, *_: object, **__: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), x.new_empty(x.shape if dense is not None else 0)


def _flat(x: Tensor) -> Tensor:
    """Returns x :: [rows, columns], contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


@op(fake=_fake)
def experts(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, chosen: Tensor, weight: Tensor,
    dense: Tensor | None = None, dense_down_proj: Tensor | None = None, *,
    gate_up_proj_scale: Tensor | None = None, gate_up_proj_minimum: Tensor | None = None,
    down_proj_scale: Tensor | None = None, down_proj_minimum: Tensor | None = None,
    dense_down_proj_scale: Tensor | None = None, dense_down_proj_minimum: Tensor | None = None,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns (y, dense_y), as defined above; without dense, an empty dense_y.

    gate_up_proj, down_proj, dense_down_proj: tensors or PackedWeights (which set …_scale and
    …_minimum)
    pdl: as in `linear`, see matvec.py
    """
    gate_up = Weight(gate_up_proj, gate_up_proj_scale, gate_up_proj_minimum)
    down = Weight(down_proj, down_proj_scale, down_proj_minimum)
    dense_down = None
    if dense is not None and dense_down_proj is not None:
        dense_down = Weight(dense_down_proj, dense_down_proj_scale, dense_down_proj_minimum)
    _check(x, gate_up, down, chosen, weight, dense, dense_down)
    dense_y = x.new_empty(0)
    if is_matvec(x, gate_up):
        assert down.data.is_contiguous(), f"{down.data.stride()=}"
        routed = Routed(_flat(chosen), _flat(weight))
        dense = None if dense is None else _flat(dense)
        y, found = expert_matvec(_flat(x), gate_up, down, routed, dense, dense_down, pdl)
        return y.view(x.shape), dense_y if found is None else found.view(x.shape)
    if dense is not None and dense_down_proj is not None:
        dense_y = linear(
            dense, dense_down_proj, weight_scale=dense_down_proj_scale,
            weight_minimum=dense_down_proj_minimum, pdl=pdl,
        )  # fmt: skip
    if calls.runs_c(x) and calls.reads(gate_up) and calls.reads(down):
        return cpu.experts(x, gate_up, down, chosen, weight), dense_y
    if runs_triton(x):
        return grouped_experts(x, gate_up, down, chosen, weight), dense_y
    recorder.missed = True  # the reference is not a C call
    return experts_reference(x, gate_up, down, chosen, weight), dense_y
