"""Start of a layer's second half in a mixture of experts (Gemma 4 26B-A4B): the router chooses the
experts of each token, and the dense MLP, which runs beside them, begins.

    h       = residual + rms_norm(x, post_norm_weight)
    dense   = gelu(gate) * up, the halves of rms_norm(h, norm_weight) @ gate_up_projᵀ
    input   = rms_norm(h, expert_norm_weight): the experts' input
    p       = softmax((h / rms(h) * router_scale / sqrt(dim)) @ router_projᵀ)
    chosen  = the top_k experts of largest p; of equal ones, those of lower index
    weight  = p / (sum of p over the chosen) * per_expert_scale

x, residual, h     :: [..., dim], bf16 | fp16 | fp32
gate_up_proj       :: [2 * ffn, dim], x.dtype, or packed (packed.py)
…norm_weight       :: [dim], any float; offset as in rmsnorm.py
router_proj        :: [experts, dim], x.dtype; router_scale :: [dim], per_expert_scale :: [experts]
dense              :: [..., ffn]; input :: [..., dim]; both x.dtype
chosen             :: [..., top_k], int32, largest p first; weight :: [..., top_k], fp32

h, dense and input are rounded as in matvec.py. The router's input, its logits and weights stay in
fp32: rounding them changes which experts are chosen. (Transformers rounds to x.dtype before the
softmax.) If p is NaN, the chosen experts are some experts, and the weights are NaN.
"""

import torch
from torch import Tensor

from gemma_fast.kernels._op import op
from gemma_fast.kernels.cpu.replay import recorder
from gemma_fast.kernels.matvec import norm_linear
from gemma_fast.kernels.rmsnorm import rms_norm


def choose_experts_reference(
    logits: Tensor, per_expert_scale: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """Returns (chosen, weight) :: [..., top_k] for the router's logits :: [..., experts]."""
    p = logits.float().softmax(-1)
    chosen = p.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    weight = p.gather(-1, chosen)
    weight = weight / weight.sum(-1, keepdim=True) * per_expert_scale.float()[chosen]
    return chosen.int(), weight


def router_reference(
    h: Tensor, scale: Tensor, proj: Tensor, per_expert_scale: Tensor, top_k: int, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Returns (chosen, weight) :: [..., top_k]."""
    logits = router_logits_reference(h, scale, proj, eps)
    return choose_experts_reference(logits, per_expert_scale, top_k)


def router_logits_reference(h: Tensor, scale: Tensor, proj: Tensor, eps: float) -> Tensor:
    """Returns the router's logits :: [..., experts], fp32."""
    x = rms_norm_in_fp32(h, eps) * scale.float() * h.shape[-1] ** -0.5
    return x @ proj.float().T


def rms_norm_in_fp32(h: Tensor, eps: float) -> Tensor:
    """Returns h / rms(h), without weight, in fp32."""
    h = h.float()
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)


def _fake(
    x: Tensor, residual: Tensor, post_norm_weight: Tensor, norm_weight: Tensor,
    gate_up_proj: Tensor, *_: Tensor, top_k: int, **__: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shape = *x.shape[:-1], top_k
    dense = x.new_empty(*x.shape[:-1], gate_up_proj.shape[0] // 2)
    chosen, weight = x.new_empty(shape, dtype=torch.int32), x.new_empty(shape, dtype=torch.float32)
    return x.new_empty(x.shape), dense, x.new_empty(x.shape), chosen, weight


@op(fake=_fake, mutates_args=("counter",))
def norm_router(
    x: Tensor, residual: Tensor, post_norm_weight: Tensor, norm_weight: Tensor,
    gate_up_proj: Tensor, expert_norm_weight: Tensor, router_scale: Tensor, router_proj: Tensor,
    per_expert_scale: Tensor, counter: Tensor, *, top_k: int, eps: float = 1e-6,
    offset: float = 1.0, gate_up_proj_scale: Tensor | None = None,
    gate_up_proj_minimum: Tensor | None = None, pdl: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns (h, dense, input, chosen, weight), as defined above.

    gate_up_proj  a tensor or a PackedWeight (which sets gate_up_proj_scale and …_minimum)
    counter       [≥ 1], int32, zeros, and zeros again afterwards: counts programs
    pdl           as in `linear`, see matvec.py
    """
    assert 0 < top_k <= router_proj.shape[0] == per_expert_scale.shape[0], f"{top_k=}"
    assert router_proj.shape[1:] == router_scale.shape == x.shape[-1:], f"{router_proj.shape=}"
    assert router_proj.dtype == x.dtype and counter.dtype == torch.int32
    dense, h = norm_linear(
        x, residual, norm_weight, post_norm_weight, gate_up_proj, geglu=True, eps=eps,
        offset=offset, weight_scale=gate_up_proj_scale, weight_minimum=gate_up_proj_minimum,
        pdl=pdl,
    )  # fmt: skip
    recorder.missed = True  # the reference is not a C call
    inputs = rms_norm(h, expert_norm_weight, eps, offset)
    chosen, weight = router_reference(h, router_scale, router_proj, per_expert_scale, top_k, eps)
    return h, dense, inputs, chosen, weight


def _fake_route(
    h: Tensor, router_scale: Tensor, router_proj: Tensor, per_expert_scale: Tensor, *, top_k: int,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    p = h.new_empty(*h.shape[:-1], router_proj.shape[0], dtype=torch.float32)
    chosen = h.new_empty(*h.shape[:-1], top_k, dtype=torch.int32)
    return p, chosen, h.new_empty(chosen.shape, dtype=torch.float32)


@op(fake=_fake_route)
def route(
    h: Tensor, router_scale: Tensor, router_proj: Tensor, per_expert_scale: Tensor, *, top_k: int,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns (p, chosen, weight), as defined above: the router alone. p :: [..., experts], fp32"""
    assert 0 < top_k <= router_proj.shape[0] == per_expert_scale.shape[0], f"{top_k=}"
    assert router_proj.shape[1:] == router_scale.shape == h.shape[-1:], f"{router_proj.shape=}"
    assert router_proj.dtype == h.dtype
    recorder.missed = True  # the reference is not a C call
    logits = router_logits_reference(h, router_scale, router_proj, eps)
    chosen, weight = choose_experts_reference(logits, per_expert_scale, top_k)
    return logits.softmax(-1), chosen, weight
