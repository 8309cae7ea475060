"""Compares every kernel, and eager PyTorch, with a float64 result. Errors are in ulps.

    python -m gemma_fast.benchmarks.verify.kernels    # prints a JSON array

The command is for Triton's interpreter, so it needs TRITON_INTERPRET=1. One ulp is the spacing of
the dtype's numbers at the true value. If the RMS of the whole output is larger, it is the spacing
at that RMS, because a sum's rounding error does not shrink with the result. A token's error is the
largest true logit minus the token's true logit, in ulps of the largest true logit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import click
import torch
from torch import Tensor

from gemma_fast.benchmarks.kernels.rivals import plain
from gemma_fast.benchmarks.kernels.suite import Call, Check, is_float, make_inputs, outputs, upcast
from gemma_fast.benchmarks.kernels.table import CHECKS
from gemma_fast.benchmarks.measure.outcome import Wrong, full_precision, verdict
from gemma_fast.benchmarks.verify import margins as of
from gemma_fast.benchmarks.verify.margins import Finding, finding

# Weights for which 1 + weight is inexact in bf16; for the last one, it is also inexact in fp16. The
# first one occurs in Gemma.
NORM_WEIGHTS = 15.8125, 2**-8, 2**-11


def check_kernels(
    device: torch.device, dtypes: Iterable[torch.dtype], part: str
) -> Iterator[Finding]:
    """Yields a finding (see margins.py) for each check and dtype. A check that raises fails."""
    for check in CHECKS:
        for dtype in dtypes:
            try:
                with torch.no_grad(), full_precision():
                    ours = errors(check, check.ours, device, dtype)
                    eager = errors(check, plain(check.formula), device, dtype)
                pairs = {name: (ours[name], eager[name]) for name in ours}
                yield finding(part, check.name, dtype, pairs)
            except Exception as problem:  # list any exception and go on
                yield finding(part, check.name, dtype, {}, verdict(problem))


def errors(
    check: Check, prepare: Callable[..., Call], device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Returns the largest error and the RMS error in ulps. With several outputs, each of the two is
    that of the worst output. If the kernel returns tokens, returns the largest error of a token."""
    exact = check.formula(*upcast(inputs_of(check, device, dtype), torch.float64))
    found = prepare(*inputs_of(check, device, dtype))()
    if check.chooses:
        return {of.CHOICE_ULP: float(choice_ulps(found, exact, dtype).amax())}
    pairs = zip(outputs(found), outputs(exact), strict=True)
    ulps = [value_ulps(ours, true, dtype) for ours, true in pairs]
    return {
        of.MAX_ULP: float(torch.stack([x.abs().amax() for x in ulps]).amax()),
        of.RMS_ULP: float(torch.stack([x.square().mean().sqrt() for x in ulps]).amax()),
    }


def inputs_of(check: Check, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """Creates inputs, with the same values in each call, because some ops write to their inputs."""
    given = make_inputs(check, check.sizes[device.type == "cuda"], device, dtype, seed=0)
    for x in given:
        if is_float(x) and x.ndim == 1:  # a norm's weight
            x[: len(NORM_WEIGHTS)] = torch.tensor(NORM_WEIGHTS)
    if device.type == "cuda":
        torch.cuda.synchronize()  # kernels may read weights before earlier kernels have ended
    return given


def value_ulps(found: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    if (found.shape, found.dtype) != (exact.shape, dtype):
        raise Wrong(f"gives {tuple(found.shape)} {found.dtype}, not {tuple(exact.shape)} {dtype}")
    size = exact.abs().clamp(min=float(exact.square().mean().sqrt()))
    return (found.double() - exact) / spacing(size, dtype)


def choice_ulps(found: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the error of each token :: [b]. A token of -1 (logits not finite) gives infinity.

    found: tokens :: [b], or logits :: [b, vocab], of which the largest gives the token
    """
    token = found.argmax(-1) if is_float(found) else found
    best, chosen = exact.amax(-1), exact.gather(1, token.clamp(min=0)[:, None])[:, 0]
    return ((best - chosen) / spacing(best, dtype)).masked_fill(token < 0, torch.inf)


def spacing(size: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the distance between neighboring numbers of the dtype at `size`."""
    eps = torch.full_like(size, torch.finfo(dtype).eps)
    return torch.ldexp(eps, torch.frexp(size).exponent - 1)


if __name__ == "__main__":
    found = check_kernels(torch.device("cpu"), [torch.float32, torch.float16], of.INTERPRETER)
    click.echo(json.dumps([x.as_dict() for x in found]))
