"""Every kernel's error against float64, in ulps, beside that of the same formula op by op.

    python -m gemma_fast.benchmarks.verify.kernels    # in Triton's interpreter: a JSON array

An error is counted in ulps: in spacings of the dtype at the true value, or, where that is smaller,
at the RMS of the whole output, because a sum's rounding does not shrink with its result. The choice
of a token errs by how far its true logit lies under the largest, in ulps of that one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_fast.benchmarks.kernels import attention as bench_attention
from gemma_fast.benchmarks.kernels import decode_attention as bench_decode_attention
from gemma_fast.benchmarks.kernels import matvec as bench_matvec
from gemma_fast.benchmarks.kernels.geglu import product_inputs
from gemma_fast.benchmarks.kernels.rmsnorm import add_inputs, norm_inputs, post_inputs
from gemma_fast.benchmarks.kernels.rotary import inputs as rotary_inputs
from gemma_fast.benchmarks.kernels.suite import Wrong, verdict
from gemma_fast.benchmarks.model.judge import full_precision
from gemma_fast.benchmarks.verify import formulas as plain
from gemma_fast.benchmarks.verify.certificate import (
    CHOICE_ULP,
    INTERPRETER,
    MAX_ULP,
    RMS_ULP,
    Line,
    line,
)
from gemma_fast.kernels.attention import attention
from gemma_fast.kernels.decode_attention import decode_attention, split_attention
from gemma_fast.kernels.embed import embed
from gemma_fast.kernels.geglu import gate_up_geglu, geglu
from gemma_fast.kernels.lm_head import next_token
from gemma_fast.kernels.matvec import linear, norm_linear
from gemma_fast.kernels.rmsnorm import add_rms_norm, rms_norm
from gemma_fast.kernels.rotary import rotary_write

# With 1 added, none is a bf16, and the last no fp16; the first is one of Gemma's.
NORM_WEIGHTS = 15.8125, 2**-8, 2**-11
Given = tuple[Any, ...]


def attention_inputs(norm: bool, **size: Any) -> Given:
    *tensors, options = bench_attention.inputs(**size)
    return *tensors, torch.randn_like(tensors[0][0, 0, 0]) / 4 if norm else None, options


def decode_inputs(norm: bool, softcap: float | None, **size: Any) -> Given:
    *tensors, scale = bench_decode_attention.inputs(**size)
    norms = [torch.randn_like(tensors[0][0, 0]) / 4 if norm else None for _ in "qk"]
    return *tensors, *norms, {"scale": scale, "softcap": softcap}


def padded_inputs(
    t: int, past: int, n: int, d: int, window: int | None = None, softcap: float | None = None,
    **make: Any,
) -> Given:  # fmt: skip
    """q :: [2, t, 2 n, d], after `past` keys, of which the second row's first ones are padding."""
    keys, values = torch.randn(2, 2, n, past + t, d, **make)
    bounds = torch.tensor([[past, past], [0, past // 3]], device=make["device"], dtype=torch.int32)
    options = {"scale": d**-0.5, "window": window, "softcap": softcap}
    return torch.randn(2, t, 2 * n, d, **make), keys, values, *bounds, options


def norm_linear_inputs(post: bool, **size: Any) -> Given:
    x, residual, weight, *rest = bench_matvec.norm_inputs(**size)
    return x, residual, weight, torch.randn_like(weight) / 2 if post else None, *rest


def choice_inputs(**size: Any) -> Given:
    """Each second token's row is a few ulps off the one before, so that rounding can decide."""
    *tensors, matrix, _ = norm_linear_inputs(False, **size, geglu=False)
    off = 4 * torch.finfo(matrix.dtype).eps * torch.randn_like(matrix[1::2])
    matrix[1::2] = matrix[:-1:2] * (1 + off)
    return *tensors, matrix


def embed_inputs(rows: int, dim: int, **make: Any) -> Given:
    """ids, weight, and the scale as Gemma has it: rounded to the dtype."""
    ids = torch.randint(999, (1, rows), device=make["device"])
    return ids, torch.randn(999, dim, **make), torch.tensor(dim**0.5, **make)


def our_embed(ids: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return embed(ids, weight, weight.shape[1] ** 0.5, prefetch=True)


def our_rotary(*given: Any) -> Given:
    rotary_write(*given)
    return given[2:4]


def our_attention(*given: Any) -> Tensor:
    *tensors, options = given
    return attention(*tensors, **options)


def our_decode(*given: Any) -> Tensor:
    qkv, keys, values, cos, sin, position, q_norm, k_norm, options = given
    arrived = torch.zeros(keys[..., 0, 0].numel(), dtype=torch.int32, device=qkv.device)
    return decode_attention(
        qkv, keys, values, cos, sin, position, arrived, q_norm, k_norm, **options, prefetch=True
    )


def our_padded(*given: Any) -> Tensor:
    q, keys, values, start, first, options = given
    if q.shape[1] > 1:
        return attention(q, keys, values, None, None, start, first=first, **options)
    arrived = torch.zeros(keys[..., 0, 0].numel(), dtype=torch.int32, device=q.device)
    out = split_attention(q[:, 0], keys, values, start, first, arrived, **options)
    return out.unsqueeze(1)


def our_norm_linear(*given: Any) -> Given:
    *tensors, gated = given
    return norm_linear(*tensors, geglu=gated, prefetch=True)


def our_choice(*given: Any) -> Tensor:
    x, residual, weight, post_weight, matrix = given
    position, arrived = torch.zeros(2, len(x), dtype=torch.int32, device=x.device)
    token = torch.full((len(x),), -1, device=x.device)
    next_token(
        x, residual, weight, post_weight, matrix, position, token, arrived,
        softcap=plain.SOFTCAP, prefetch=True,
    )  # fmt: skip
    return token


class Case(NamedTuple):
    """A kernel on inputs(**size, device=…, dtype=…), and its formula. sizes: here, and on a GPU."""

    name: str
    inputs: Callable[..., Given]
    formula: Callable[..., Any]
    ours: Callable[..., Any]
    sizes: Sequence[dict[str, Any]]


def both(sizes: Sequence[dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
    return [size | more for size in sizes]


ALL = {"window": 29, "softcap": 5.0, "norm": True}
ROWS = {"rows": 16, "dim": 640}, {"rows": 512, "dim": 2304}
TOKENS = {"t": 40, "n": 2, "d": 32, "norm": False}, {"t": 1024, "n": 4, "d": 256, "norm": False}
PROMPT = [size | {"heads": 2 * size["n"]} for size in TOKENS]
NEW = (
    {"b": 2, "depth": 150, "heads": 4, "n": 2, "d": 32, "norm": False, "softcap": None},
    {"b": 2, "depth": 4000, "heads": 8, "n": 4, "d": 256, "norm": False, "softcap": None},
)
LATER = (
    {"t": 20, "past": 150, "n": 2, "d": 32},
    {"t": 500, "past": 3000, "n": 4, "d": 256, "window": 1024},
)
MATRIX = {"b": 1, "dim": 320, "out": 96}, {"b": 1, "dim": 2304, "out": 4096}
VOCAB = {"b": 8, "dim": 320, "out": 1001}, {"b": 8, "dim": 2304, "out": 50_001}
CASES = (
    Case("embed", embed_inputs, plain.embed, our_embed, ROWS),
    Case("rms_norm", norm_inputs, plain.norm, rms_norm, ROWS),
    Case("add_rms_norm", add_inputs, plain.add, add_rms_norm, ROWS),
    Case("add_rms_norm, post-norm", post_inputs, plain.add, add_rms_norm, ROWS),
    Case("rotary_write", rotary_inputs, plain.rotary, our_rotary, TOKENS),
    Case("rotary_write, norm", rotary_inputs, plain.rotary, our_rotary, both(TOKENS, norm=True)),
    Case("attention", attention_inputs, plain.attention, our_attention, PROMPT),
    Case("attention, window, cap, norm", attention_inputs, plain.attention, our_attention,
         both(PROMPT, **ALL)),
    Case("decode_attention", decode_inputs, plain.decode, our_decode, NEW),
    Case("decode_attention, window, cap, norm", decode_inputs, plain.decode, our_decode,
         both(NEW, **ALL)),
    Case("attention, rotated, padding", padded_inputs, plain.padded, our_padded, LATER),
    Case("split_attention, padding, cap", padded_inputs, plain.padded, our_padded,
         both(LATER, t=1, softcap=5.0)),
    Case("geglu", lambda **size: add_inputs(**size)[:2], plain.geglu, geglu, ROWS),
    Case("gate_up_geglu", product_inputs, plain.product, gate_up_geglu,
         [{"m": 40, "k": 320, "dim": 96}, {"m": 512, "k": 2304, "dim": 4096}]),
    Case("linear", bench_matvec.inputs, F.linear, linear, MATRIX),
    Case("linear, 8 rows", bench_matvec.inputs, F.linear, linear, both(MATRIX, b=8)),
    Case("norm_linear", norm_linear_inputs, plain.norm_linear, our_norm_linear,
         both(MATRIX, post=False, geglu=False)),
    Case("norm_linear, post-norm, geglu, 8 rows", norm_linear_inputs, plain.norm_linear,
         our_norm_linear, both(MATRIX, b=8, post=True, geglu=True)),
    Case("next_token, 8 rows", choice_inputs, plain.logits, our_choice, VOCAB),
    Case("next_token, 16 rows", choice_inputs, plain.logits, our_choice, both(VOCAB, b=16)),
)  # fmt: skip


def check_kernels(device: torch.device, dtypes: Iterable[torch.dtype], part: str) -> Iterator[Line]:
    """A line for each case and dtype; a kernel that raises has failed."""
    for case in CASES:
        for dtype in dtypes:
            try:
                with torch.no_grad(), full_precision():
                    ours = errors(case, case.ours, device, dtype)
                    eager = errors(case, case.formula, device, dtype)
                pairs = {name: (ours[name], eager[name]) for name in ours}
                yield line(part, case.name, dtype, pairs)
            except Exception as problem:  # of any kind: it is listed, and the rest runs
                yield line(part, case.name, dtype, {}, verdict(problem))


def errors(
    case: Case, provider: Callable[..., Any], device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """The largest and the RMS error, in ulps; of several outputs the worst."""
    upcast = (x.double() if is_float(x) else x for x in inputs_of(case, device, dtype))
    exact, found = case.formula(*upcast), provider(*inputs_of(case, device, dtype))
    if case.ours is our_choice:
        return {CHOICE_ULP: float(choice_ulps(found, exact, dtype).amax())}
    pairs = zip(*([x] if isinstance(x, Tensor) else x for x in (found, exact)), strict=True)
    ulps = [value_ulps(ours, true, dtype) for ours, true in pairs]
    return {
        MAX_ULP: float(torch.stack([x.abs().amax() for x in ulps]).amax()),
        RMS_ULP: float(torch.stack([x.square().mean().sqrt() for x in ulps]).amax()),
    }


def inputs_of(case: Case, device: torch.device, dtype: torch.dtype) -> Given:
    """The same each time, because some ops write to their inputs."""
    torch.manual_seed(0)
    given = case.inputs(device=device, dtype=dtype, **case.sizes[device.type == "cuda"])
    for x in given:
        if is_float(x) and x.ndim == 1:  # of a norm
            x[: len(NORM_WEIGHTS)] = torch.tensor(NORM_WEIGHTS)
    if device.type == "cuda":
        torch.cuda.synchronize()  # at rest: a kernel may then prefetch its weights
    return given


def is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def value_ulps(found: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    if (found.shape, found.dtype) != (exact.shape, dtype):
        raise Wrong(f"gives {tuple(found.shape)} {found.dtype}, not {tuple(exact.shape)} {dtype}")
    size = exact.abs().clamp(min=float(exact.square().mean().sqrt()))
    return (found.double() - exact) / spacing(size, dtype)


def choice_ulps(found: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """found :: [b] tokens, or logits :: [b, vocab]. A row that was refused: infinite."""
    token = found.argmax(-1) if is_float(found) else found
    best, chosen = exact.amax(-1), exact.gather(1, token.clamp(min=0)[:, None])[:, 0]
    return ((best - chosen) / spacing(best, dtype)).masked_fill(token < 0, torch.inf)


def spacing(size: Tensor, dtype: torch.dtype) -> Tensor:
    """How far apart the dtype's numbers lie at `size`."""
    eps = torch.full_like(size, torch.finfo(dtype).eps)
    return torch.ldexp(eps, torch.frexp(size).exponent - 1)


if __name__ == "__main__":
    found = check_kernels(torch.device("cpu"), [torch.float32, torch.float16], INTERPRETER)
    click.echo(json.dumps([line.as_dict() for line in found]))
