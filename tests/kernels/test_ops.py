"""Tests all ops with torch.library.opcheck. Also tests that derivatives and wrong dtypes raise
errors, and that inputs without tokens give empty results."""

import inspect
from collections.abc import Callable

import pytest
import torch
from marks import slow
from packed_weights import PACKINGS, packed_weight
from torch.library import opcheck

from gemma_fast.kernels.attention import attention
from gemma_fast.kernels.decode_attention import decode_attention, split_attention
from gemma_fast.kernels.embed import embed
from gemma_fast.kernels.experts import experts
from gemma_fast.kernels.geglu import gate_up_geglu, geglu
from gemma_fast.kernels.lm_head import next_token
from gemma_fast.kernels.matvec import linear, norm_linear
from gemma_fast.kernels.per_layer import per_layer_inputs
from gemma_fast.kernels.rmsnorm import add_norm, add_rms_norm, rms_norm
from gemma_fast.kernels.rotary import rotary_write
from gemma_fast.kernels.router import norm_router, route
from gemma_fast.kernels.sample import sample_token

B, T, N, M, D, SLOTS = 2, 5, 2, 2, 32, 16


def tensors() -> dict[str, torch.Tensor | None]:
    return {
        "q": torch.randn(B, T, N * M, D),
        "query": torch.randn(B, N * M, D),
        "left_padding": torch.tensor([0, 2], dtype=torch.int32),
        "k": torch.randn(B, T, N, D),
        "v": torch.randn(B, T, N, D),
        "keys": torch.randn(B, N, SLOTS, D),
        "values": torch.randn(B, N, SLOTS, D),
        "cos": torch.randn(B, T, D // 2),
        "sin": torch.randn(B, T, D // 2),
        "query_offset": torch.tensor([3, -2], dtype=torch.int32),
        "norm_weight": torch.randn(D),
        "gate_up_proj": torch.randn(6, D),
        "x": torch.randn(B, T, D),
        "residual": torch.randn(B, T, D),
        "post_norm_weight": torch.randn(D),
        "layer_scalar": torch.randn(1),
        "up": torch.randn(B, T, 6),
        "dense_down": torch.randn(D, 6),
        "projected": torch.randn(B, T, 3 * D),
        "token_ids": torch.randint(7, (B, T)),
        "table": torch.randn(7, 3 * D),
        "router_proj": torch.randn(4, D),
        "per_expert_scale": torch.rand(4),
        "experts_gate_up": torch.randn(4 * 2 * D, D),
        "experts_down": torch.randn(4 * D, D),
        "chosen": torch.randint(4, (B, T, 2), dtype=torch.int32),
        "expert_weight": torch.rand(B, T, 2),
        "no_tensor": None,
        "rows": torch.randn(B, D),
        "residual_rows": torch.randn(B, D),
        "embedding": torch.randn(7, D),
        "ids": torch.tensor([[1, 6, 0], [2, 2, 3]]),
        "logits": torch.randn(B, 7),
        "qkv": torch.randn(B, N * M + 2 * N, D),
        "qk": torch.randn(B, N * M + N, D),
        "cos_table": torch.randn(SLOTS, D // 2),
        "sin_table": torch.randn(SLOTS, D // 2),
        "k_norm": torch.randn(D),
        "counter": torch.zeros(B * T, dtype=torch.int32),
        "token": torch.zeros(B, dtype=torch.int64),
        "temperature": torch.ones(B),
        "seed": torch.ones(B, dtype=torch.int64),
        **packed("gate_up_proj", 6, D),
        **packed("embedding", 7, D),
        **packed("table", 7, 3 * D),
        **packed("experts_gate_up", 4 * 2 * D, D),
        **packed("experts_down", 4 * D, D),
    }


def packed(name: str, rows: int, dim: int) -> dict[str, torch.Tensor]:
    weight, _ = packed_weight(rows, dim, PACKINGS["int4, group 32, minimum"])
    return {f"packed_{name}{part}": x.data for part, x in zip(PARTS, weight.weight, strict=True)}


def tensors_on(device: str) -> dict[str, torch.Tensor | None]:
    return {name: x if x is None else x.to(device) for name, x in tensors().items()}


# Suffixes of the names of a packed weight's parts: data, scale, minimum.
PARTS = "", "_scale", "_minimum"
ROTARY = ("k", "v", "keys", "values", "cos", "sin", "query_offset", "norm_weight")
NORM_LINEAR = ("x", "residual", "norm_weight", "post_norm_weight", "gate_up_proj")
DECODE = ("qkv", "keys", "values", "cos_table", "sin_table", "query_offset", "counter")
PER_LAYER = ("projected", "token_ids", "table", "norm_weight")
CHOICE = ("query_offset", "token", "counter", "temperature", "seed")
NEXT = ("rows", "residual_rows", "norm_weight", "post_norm_weight", "embedding", *CHOICE)
ROTATED = ("q", "keys", "values", "no_tensor", "no_tensor", "query_offset")
SPLIT = ("query", "keys", "values", "query_offset", "left_padding", "counter")
ATTENTION = ("q", "keys", "values", "cos", "sin", "query_offset", "norm_weight")
NORM_ROUTER = (
    "x", "residual", "post_norm_weight", "norm_weight", "gate_up_proj", "norm_weight",
    "norm_weight", "router_proj", "per_expert_scale", "counter",
)  # fmt: skip
EXPERTS = ("x", "experts_gate_up", "experts_down", "chosen", "expert_weight")
WITH_DENSE = (*EXPERTS, "up", "dense_down")
PACKED = ("gate_up_proj", "embedding", "table", "experts_gate_up", "experts_down")


def packed_entry(op: Callable, names: tuple[str, ...], options: dict) -> tuple:
    """Returns an entry of OPS with packed weights."""
    parameters = list(inspect.signature(op).parameters)
    factors = {
        f"{parameter}{part}": f"packed_{name}{part}"
        for parameter, name in zip(parameters, names, strict=False)
        if name in PACKED
        for part in PARTS[1:]
    }
    return op, tuple(f"packed_{x}" if x in PACKED else x for x in names), options | factors


# (op, names of its arguments in tensors(), options). An option of type str is a name, too. In each
# op's first entry, no argument is None.
OPS = [
    (rms_norm, ("q", "norm_weight"), {}),
    (add_rms_norm, ("k", "v", "norm_weight"), {}),
    (add_rms_norm, ("k", "v", "norm_weight", "norm_weight"), {"layer_scalar": "layer_scalar"}),
    (rms_norm, ("q", "no_tensor"), {"offset": 0.0}),
    (add_norm, ("k", "v", "norm_weight"), {"offset": 0.0}),
    (add_norm, ("k", "v", "norm_weight"), {"residual_weight": "norm_weight"}),
    (geglu, ("q", "q"), {}),
    (gate_up_geglu, ("q", "gate_up_proj"), {}),
    (rotary_write, ROTARY, {}),
    (rotary_write, ROTARY[:-1], {}),
    (rotary_write, ROTARY, {"offset": 0.0, "v_norm": True}),
    (attention, ATTENTION, {"scale": 0.2}),
    (attention, ATTENTION[:-1], {"scale": 0.2, "window": 4, "softcap": 3.0}),
    (attention, ATTENTION, {"scale": 0.2, "offset": 0.0}),
    (attention, ROTATED, {"scale": 0.2, "window": 4}),
    (split_attention, SPLIT, {"scale": 0.2}),
    (linear, ("x", "gate_up_proj"), {}),
    (norm_linear, NORM_LINEAR, {}),
    (
        norm_linear,
        ("x", "no_tensor", "norm_weight", "no_tensor", "gate_up_proj"),
        {"geglu": True},
    ),
    (norm_linear, NORM_LINEAR, {"layer_scalar": "layer_scalar", "offset": 0.0}),
    (
        norm_linear,
        ("x", "residual", "no_tensor", "post_norm_weight", "gate_up_proj"),
        {"up": "up"},
    ),
    (norm_router, NORM_ROUTER, {"top_k": 2}),
    (route, ("x", "norm_weight", "router_proj", "per_expert_scale"), {"top_k": 2}),
    (experts, WITH_DENSE, {}),
    (experts, EXPERTS, {}),
    (per_layer_inputs, PER_LAYER, {"scale": 0.2}),
    (embed, ("ids", "embedding"), {"scale": 2.0}),
    (decode_attention, (*DECODE, "norm_weight", "k_norm"), {"scale": 0.2}),
    (decode_attention, DECODE, {"scale": 0.2, "window": 4, "softcap": 3.0}),
    (
        decode_attention,
        ("qk", *DECODE[1:], "norm_weight", "k_norm"),
        {"scale": 0.2, "heads": "qk", "v_norm": True, "offset": 0.0},
    ),
    (decode_attention, ("query", *DECODE[1:], "norm_weight"), {"scale": 0.2, "heads": "q"}),
    (sample_token, ("logits", *CHOICE), {}),
    (sample_token, ("logits", *CHOICE[:-2]), {}),
    (next_token, NEXT, {"softcap": 30.0}),
    (next_token, NEXT, {"layer_scalar": "layer_scalar", "offset": 0.0}),
    packed_entry(linear, ("x", "gate_up_proj"), {}),
    packed_entry(norm_linear, NORM_LINEAR, {"geglu": True}),
    packed_entry(norm_router, NORM_ROUTER, {"top_k": 2}),
    packed_entry(experts, WITH_DENSE, {}),
    packed_entry(per_layer_inputs, PER_LAYER, {"scale": 0.2}),
    packed_entry(embed, ("ids", "embedding"), {"scale": 2.0, "dtype": torch.float16}),
    packed_entry(next_token, NEXT, {"softcap": 30.0}),
]
FIRST = {op.__name__: (op, names, options) for op, names, options in reversed(OPS)}


def test_every_registered_op_is_tested():
    registered = torch._C._dispatch_get_all_op_names()
    assert set(FIRST) == {x.split("::")[1] for x in registered if x.startswith("gemma_fast::")}


@pytest.mark.parametrize(
    ("op", "names", "options"),
    OPS,
    ids=lambda x: getattr(x, "__name__", None) or str(x),
)
@pytest.mark.parametrize("permuted", [*slow(False), True], ids=["contiguous", "permuted"])
def test_op_passes_opcheck(op, names, options, permuted, device):
    """Outputs must be contiguous for all strides of the inputs, because the fake outputs are."""
    given = tensors_on(device)
    for name in ("q", "k", "v", "x", "up", "projected") if permuted else ():
        given[name] = given[name].transpose(0, 1).contiguous().transpose(0, 1)
    overload = getattr(torch.ops.gemma_fast, op.__name__).default
    options = {
        key: given[x] if isinstance(x, str) and key != "heads" else x for key, x in options.items()
    }
    opcheck(overload, tuple(given[name] for name in names), options)


@pytest.mark.parametrize(("op", "names", "options"), FIRST.values(), ids=FIRST)
def test_input_that_requires_grad_raises(op, names, options):
    parameters = list(inspect.signature(op).parameters)
    for i in range(len(names)):
        given = [tensors()[n] for n in names]
        if not given[i].is_floating_point():  # integers have no gradient
            continue
        given[i].requires_grad_()
        message = f"{op.__name__} has no derivative, and {parameters[i]} requires grad"
        with pytest.raises(ValueError, match=message):
            op(*given, **options)
        with torch.no_grad():
            op(*given, **options)


def test_option_that_requires_grad_raises():
    given = tensors()
    up = given["up"].requires_grad_()
    with pytest.raises(ValueError, match="norm_linear has no derivative, and up requires grad"):
        norm_linear(*(given[name] for name in NORM_LINEAR), up=up)


def test_forward_mode_differentiation_raises():
    x, weight = torch.randn(2, 8), torch.randn(8)
    with pytest.raises(ValueError, match="rms_norm has no derivative, and x requires grad"):
        torch.func.jvp(lambda x: rms_norm(x, weight), (x,), (x,))


def test_autograd_detects_overwritten_keys(device):
    given = tensors_on(device)
    weight = torch.ones((), device=device, requires_grad=True)
    loss = (weight * given["keys"]).sum()
    rotary_write(*(given[name] for name in ROTARY))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["keys", "cos", "query_offset"])
def test_wrong_dtypes_raise(name, device):
    given = tensors_on(device)
    given[name] = given[name].double()
    for op, names in ((rotary_write, ROTARY), (attention, ATTENTION)):
        options = {"scale": 0.2} if op is attention else {}
        with pytest.raises(AssertionError, match=r"dtype=torch\.float64"):
            op(*(given[name] for name in names), **options)


def test_no_tokens_give_an_empty_result(device):
    given = tensors_on(device)
    for name in ("q", "k", "v", "cos", "sin"):
        given[name] = given[name][:, :0]
    rotary_write(*(given[name] for name in ROTARY))
    out = attention(*(given[name] for name in ATTENTION), scale=0.2)
    assert out.shape == given["q"].shape
