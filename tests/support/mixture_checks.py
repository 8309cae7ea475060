"""Makes random inputs of a router and of experts, and compares their results with fp64."""

import torch
from matvec_checks import packed_weight_of, weight_of
from oracles import geglu_oracle, root_sum_square
from tolerances import (
    GEGLU_ROUNDINGS,
    assert_rounded,
    geglu_size,
    norm_roundings,
    rounding_error,
)


def router_inputs(rows, dim, ffn, count, dtype):
    """Returns the arguments of norm_router. Logits are about 1, so that weights differ."""
    x, residual = torch.randn(2, rows, dim).to(dtype)
    norms = torch.rand(3, dim) + 0.5
    proj = (3 * torch.randn(count, dim)).to(dtype)
    scales = (torch.rand(dim) + 0.5).to(dtype), (torch.rand(count) + 0.5).to(dtype)
    gate_up, counter = weight_of(2 * ffn, dim, dtype, "cpu"), torch.zeros(8, dtype=torch.int32)
    return [x, residual, *norms[:2], gate_up, norms[2], scales[0], proj, scales[1], counter]


def expert_weight(out, dim, packing, dtype):
    """Returns a weight, and in fp64 its elements and their size; packing None: not packed."""
    if packing is None:
        weight = weight_of(out, dim, dtype, "cpu")
        return weight, weight.double(), None
    return packed_weight_of(out, dim, packing, "cpu")


def routed(rows, count, top_k):
    """Returns chosen and weight :: [rows, top_k]."""
    chosen = torch.rand(rows, count).argsort()[:, :top_k].int()
    return chosen, torch.rand(rows, top_k) + 0.1


def normed(h, eps):
    h = h.double()
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)


def check_expert_input(found, h, weight, eps, offset):
    exact = normed(h, eps) * (offset + weight.double())
    assert_rounded(found, exact, norm_roundings(h.shape[-1]))


def check_router(chosen, weight, h, scale, proj, per_expert_scale, eps):
    """chosen, weight :: [rows, top_k] for h :: [rows, dim]. Logits are sums of dim products in
    fp32, so experts whose logits differ by less than their errors may change places."""
    dim, experts, top_k = h.shape[-1], len(proj), chosen.shape[-1]
    x = normed(h, eps) * scale.double() * dim**-0.5
    logits = x @ proj.double().T  # [rows, experts]
    error = rounding_error(dim + norm_roundings(dim) + 3) * root_sum_square(x, proj)
    error = 2 * error.amax(-1, keepdim=True)  # of a difference of two logits
    assert chosen.dtype == torch.int32 and weight.dtype == torch.float32
    index = chosen.long()
    assert index.min() >= 0 and index.max() < experts
    assert all(len(set(row)) == top_k for row in index.tolist()), "an expert is chosen twice"
    found = logits.gather(-1, index)  # [rows, top_k]
    assert (found[:, 1:] <= found[:, :-1] + error).all(), "the first expert is not the largest"
    others = logits.scatter(-1, index, float("-inf")).amax(-1, keepdim=True)
    assert (others <= found[:, -1:] + error).all(), "a larger expert is not chosen"
    exact = found.softmax(-1) * per_expert_scale.double()[index]
    # exp of two logits, a sum of top_k, a division and a factor
    relative = 2 * error + rounding_error(top_k + 14)
    assert ((weight.double() - exact).abs() <= relative * exact.abs() + 1e-37).all()


def check_experts(y, x, gate_up, down, chosen, weight, sizes=(None, None), steps=1):
    """gate_up, down: fp64. sizes: of the numbers that their elements are sums of. steps: results
    that are rounded to y.dtype before y: hidden, and for prompts more."""
    rows, dim = x.shape
    width, top_k = down.shape[1], chosen.shape[-1]
    gate_up, gate_up_size, down, down_size = (
        w.view(-1, size, w.shape[-1])
        for w, size in (
            (gate_up, 2 * width), (gate_up if sizes[0] is None else sizes[0], 2 * width),
            (down, dim), (down if sizes[1] is None else sizes[1], dim),
        )
    )  # fmt: skip
    exact, square = torch.zeros(2, rows, dim, dtype=torch.float64)
    for row in range(rows):
        for index, factor in zip(chosen[row].tolist(), weight[row].double(), strict=True):
            given = x[row : row + 1].double()
            sums = given @ gate_up[index].T  # [1, 2 * width]
            size = root_sum_square(given, gate_up_size[index])
            size = size if steps == 1 else size + sums.abs()
            hidden = geglu_oracle(sums)  # [1, width]
            term = factor * (hidden @ down[index].T)[0]  # [dim]
            size = hidden.abs() + geglu_size(sums, size)
            error = factor * root_sum_square(size, down_size[index])[0]
            exact[row] += term
            square[row] += error.square() + term.square()
    roundings = 2 * dim + width + top_k + GEGLU_ROUNDINGS
    assert y.dtype == x.dtype
    assert_rounded(y, exact, roundings, square.sqrt(), steps)
