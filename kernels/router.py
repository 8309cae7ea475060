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

from gemma_fast.kernels._matmul_input import MatmulInput
from gemma_fast.kernels._matvec_block import row_block
from gemma_fast.kernels._op import op
from gemma_fast.kernels._routing import Router, RouterSpec, _norm_router_kernel, _router_kernel
from gemma_fast.kernels._skinny import MAX_ROWS
from gemma_fast.kernels._skinny import default_config as skinny_config
from gemma_fast.kernels._triton import triton
from gemma_fast.kernels.cpu import calls
from gemma_fast.kernels.cpu import experts as cpu
from gemma_fast.kernels.cpu.replay import recorder
from gemma_fast.kernels.launch import gpu, launch_config, runs_triton
from gemma_fast.kernels.matvec import check_matmul, is_matvec, norm_linear
from gemma_fast.kernels.packed import Weight
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


def default_config(rows: int, weight: Weight, itemsize: int) -> dict[str, int]:
    """Returns the launch config for up to MAX_ROWS rows. Each of the first programs computes the
    logits of one row; with several rows, it has more experts, so that it reads x less often."""
    if rows == 1:
        return {"BLOCK_E": 2, "BLOCK_B": 1, **row_block(weight), "num_warps": 4}
    return {"BLOCK_E": 4, **skinny_config(weight, itemsize)}


def _new_router(
    h: Tensor, scale: Tensor, proj: Tensor, per_expert_scale: Tensor, top_k: int
) -> Router:
    """Allocates the router's logits and results for h :: [rows, dim]."""
    logits = torch.empty(len(h), len(proj), dtype=torch.float32, device=h.device)
    chosen = torch.empty(len(h), top_k, dtype=torch.int32, device=h.device)
    weight = torch.empty(len(h), top_k, dtype=torch.float32, device=h.device)
    return Router(scale, proj, per_expert_scale, logits, chosen, weight)


def _launch(
    inputs: MatmulInput, weight: Weight, expert_norm_weight: Tensor, router: Router,
    counter: Tensor, spec: RouterSpec, pdl: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns (h, dense, input) of rows x. Fills the router's results."""
    x, ffn = inputs.x, weight.shape[0] // 2
    h, expert_input = torch.empty_like(x), torch.empty_like(x)
    dense = torch.empty(len(x), ffn, dtype=x.dtype, device=x.device)
    config = launch_config("norm_router", default_config(len(x), weight, x.element_size()))
    programs = len(x) * triton.cdiv(spec.experts, config["BLOCK_E"])
    programs += triton.cdiv(ffn, config["BLOCK_N"] // 2)
    _norm_router_kernel[(programs,)](
        inputs, weight, router, counter, expert_norm_weight, dense, h, expert_input, len(x),
        SPEC=spec, OUT=ffn, GROUP=weight.group, **config, **gpu(x.device).pdl_options(pdl),
    )  # fmt: skip
    return h, dense, expert_input


def _route(h: Tensor, router: Router, spec: RouterSpec) -> None:
    """Fills the router's results for any number of rows h."""
    config = {"BLOCK_M": 16, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    config = launch_config("router", config)
    if len(h):
        _router_kernel[(triton.cdiv(len(h), config["BLOCK_M"]),)](
            h, router, len(h), SPEC=spec, **config
        )  # fmt: skip


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
    counter       [≥ rows, at most MAX_ROWS], int32, zeros, and zeros again afterwards: counts
                  programs
    pdl           as in `linear`, see matvec.py

    Up to MAX_ROWS rows are one launch. More rows take a norm_linear, a norm and the router. Runs
    the reference of the router where Triton does not run.
    """
    dim, experts, rows = x.shape[-1], router_proj.shape[0], x[..., 0].numel()
    assert 0 < top_k <= experts == per_expert_scale.shape[0], f"{top_k=}"
    assert router_proj.shape[1:] == router_scale.shape == x.shape[-1:], f"{router_proj.shape=}"
    assert router_proj.dtype == x.dtype and router_proj.is_contiguous()
    assert counter.dtype == torch.int32 and counter.numel() >= min(rows, MAX_ROWS), f"{rows=}"
    assert router_scale.is_contiguous() and per_expert_scale.is_contiguous()
    packed = Weight(gate_up_proj, gate_up_proj_scale, gate_up_proj_minimum)
    spec = RouterSpec(experts, top_k, dim, eps, offset)
    given = router_scale, router_proj, per_expert_scale, top_k
    results = *x.shape[:-1], top_k
    if is_matvec(x, packed):
        flat, rest = (z.reshape(-1, dim).contiguous() for z in (x, residual))  # [rows, dim]
        inputs = MatmulInput(flat, rest, norm_weight, post_norm_weight, None)
        check_matmul(inputs, packed)
        assert expert_norm_weight.shape == (dim,) and expert_norm_weight.stride(0) == 1
        router = _new_router(flat, *given)
        h, dense, expert_input = _launch(
            inputs, packed, expert_norm_weight, router, counter, spec, pdl
        )
        return (
            h.view(x.shape), dense.view(*x.shape[:-1], -1), expert_input.view(x.shape),
            router.chosen.view(results), router.weight.view(results),
        )  # fmt: skip
    dense, h = norm_linear(
        x, residual, norm_weight, post_norm_weight, gate_up_proj, geglu=True, eps=eps,
        offset=offset, weight_scale=gate_up_proj_scale, weight_minimum=gate_up_proj_minimum,
        pdl=pdl,
    )  # fmt: skip
    if calls.runs_c(x):
        factors = expert_norm_weight, router_scale, router_proj, per_expert_scale
        return h, dense, *cpu.route(h, *factors, top_k=top_k, eps=eps, offset=offset)
    expert_input = rms_norm(h, expert_norm_weight, eps, offset)
    if runs_triton(x):
        flat = h.view(-1, dim)  # [rows, dim]
        router = _new_router(flat, *given)
        _route(flat, router, spec)
        chosen, weight = router.chosen.view(results), router.weight.view(results)
    else:
        recorder.missed = True  # the reference is not a C call
        chosen, weight = router_reference(h, *given, eps)
    return h, dense, expert_input, chosen, weight


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
    dim, experts = h.shape[-1], router_proj.shape[0]
    assert 0 < top_k <= experts == per_expert_scale.shape[0], f"{top_k=}"
    assert router_proj.shape[1:] == router_scale.shape == h.shape[-1:], f"{router_proj.shape=}"
    assert router_proj.dtype == h.dtype and router_proj.is_contiguous()
    assert router_scale.is_contiguous() and per_expert_scale.is_contiguous()
    if runs_triton(h):
        flat = h.reshape(-1, dim).contiguous()  # [rows, dim]
        router = _new_router(flat, router_scale, router_proj, per_expert_scale, top_k)
        _route(flat, router, RouterSpec(experts, top_k, dim, eps, 0.0))
        p, results = router.logits.softmax(-1), (*h.shape[:-1], top_k)
        return (
            p.view(*h.shape[:-1], experts), router.chosen.view(results),
            router.weight.view(results),
        )  # fmt: skip
    recorder.missed = True  # the reference is not a C call
    logits = router_logits_reference(h, router_scale, router_proj, eps)
    chosen, weight = choose_experts_reference(logits, per_expert_scale, top_k)
    return logits.softmax(-1), chosen, weight
