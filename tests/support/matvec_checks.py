"""Compares results of linear and norm_linear with fp64."""

import torch
from kernel_checks import strided
from oracles import geglu_oracle, root_sum_square
from tolerances import GEGLU_ROUNDINGS, assert_rounded, geglu_size, norm_roundings

from gemma_fast.kernels.packed import PackedRows, PackedWeight

EPS = 1e-2  # large enough to change the norm's results


def weight_of(out, dim, dtype, device):
    return (torch.randn(out, dim, device=device) / dim**0.5).to(dtype)


def packed_weight_of(out, dim, packing, device):
    """Returns a random PackedWeight [out, dim], and in fp64 what its values are, and their size:
    that of the terms scale * q and minimum."""
    low = 0 if packing.bits == 4 and packing.minimum else -(1 << packing.bits - 1)
    q = torch.randint(low, low + (1 << packing.bits), (out, dim), dtype=torch.int8)
    groups = out, dim // packing.group
    scale = (torch.rand(groups) + 0.5) / dim**0.5 / (1 << packing.bits - 1)
    minimum = torch.randn(groups) / dim**0.5 if packing.minimum else None
    weight = PackedWeight((out, dim), packing)
    weight.write(0, PackedRows(q, scale, minimum))
    terms = [q * weight.scale.double().repeat_interleave(packing.group, 1)]
    if weight.minimum is not None:
        terms.append(weight.minimum.double().repeat_interleave(packing.group, 1))
    exact, size = sum(terms), sum(x.abs() for x in terms)
    return weight.to(device), exact.to(device), size.to(device)


def norm(x, weight, offset=1.0):
    x, weight = x.double(), weight.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * (offset + weight)


def check_linear(y, x, weight, size=None, steps=0):
    """size: of the numbers that weights are sums of; steps: roundings of a weight to y.dtype."""
    assert y.dtype == x.dtype
    exact = x.double() @ weight.double().T
    size = root_sum_square(x, weight if size is None else size)
    assert_rounded(y, exact, x.shape[-1], size, steps)


def check_norm_linear(
    found, x, residual, norm_weight, post_weight, weight, geglu=False, up=None, layer_scalar=None,
    offset=1.0, size=None, weight_steps=0,
):  # fmt: skip
    """size, weight_steps: as in check_linear."""
    (y, h), dim = found, x.shape[-1]
    assert h.dtype == y.dtype == x.dtype
    post = x.double() if post_weight is None else norm(x, post_weight, offset)
    exact = post if residual is None else post + residual.double()
    steps = int(post_weight is not None)
    if layer_scalar is not None:
        post, exact, steps = post * layer_scalar.double(), exact * layer_scalar.double(), steps + 1
    assert_rounded(h, exact, norm_roundings(dim), post.abs(), steps)
    normed = h.double() if norm_weight is None else norm(h, norm_weight, offset)
    exact = normed @ weight.double().T
    size = root_sum_square(normed, weight if size is None else size)
    if up is not None:
        exact, size = torch.cat((exact, up.double()), -1), torch.cat((size, 0 * size), -1)
    if geglu or up is not None:
        exact, size = geglu_oracle(exact), geglu_size(exact, size)
    # The normalized row is rounded to the dtype before the matmul.
    assert_rounded(y, exact, norm_roundings(dim) + dim + GEGLU_ROUNDINGS, size, 1 + weight_steps)


# Arguments of norm_linear for Gemma 4. Those with `up` are the per-layer gate, which has no norm.
GEMMA_4 = {
    "layer_scalar": {"layer_scalar": torch.tensor([0.37])},
    "layer_scalar, geglu": {"layer_scalar": torch.tensor([0.37]), "geglu": True},
    "no norm": {},
    "no norm, up": {"up": True},
    "up": {"up": True, "layer_scalar": torch.tensor([0.37])},
}


def gemma_4_inputs(rows, dim, out, case, dtype=torch.float32, device="cpu"):
    """Returns positional arguments of norm_linear and options."""
    x = 3 * torch.randn(rows, dim, device=device).to(dtype)
    residual = torch.randn(rows, dim, device=device).to(dtype)
    norm_weight, post_weight = torch.randn(2, dim, device=device).to(dtype)
    options = dict(GEMMA_4[case])
    if "layer_scalar" in options:
        options["layer_scalar"] = options["layer_scalar"].to(dtype).to(device)
    if "up" in options:
        options["up"] = strided((rows, out), dtype, device)
    given = x, residual, None if "no norm" in case else norm_weight, post_weight
    return (*given, weight_of(out, dim, dtype, device)), options
