"""Outcome of a provider's run: its status, its error, and which results fail the whole run."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

EAGER, OURS = "eager", "gemma_fast"
OURS_BY_POINTERS = "gemma_fast, no descriptors"
# Without programmatic dependent launch: as with rivals, no call overlaps the previous one.
OURS_ALONE = "gemma_fast, no overlap"
COPY = "copy of the same bytes (yardstick)"
NOT_MEASURED, WITHOUT_GRAPHS = "ok, not measured", "ok, Inductor skipped CUDA graphs"
R = TypeVar("R", bound=Any)


class Wrong(Exception):
    """An output differs from the oracle's."""


def verdict(problem: Exception) -> str:
    """Returns a one-line status for an exception. Prints the traceback to stderr if unexpected."""
    text = str(problem).strip().split("\n")[0] or type(problem).__name__
    kinds = {Wrong: "wrong", ImportError: "not installed", NotImplementedError: "cannot"}
    word = next((word for kind, word in kinds.items() if isinstance(problem, kind)), "failed")
    if word == "failed":
        traceback.print_exception(problem)
    return f"{word}: {text}"


def serious(results: Iterable[Any]) -> bool:
    """Returns whether any result was wrong, or one of this project is not ok."""
    return any(
        r.status.startswith("wrong") or (r.provider == OURS and not r.status.startswith("ok"))
        for r in results
    )


def with_took(results: Iterable[R]) -> Iterator[R]:
    """Yields the results, each with the seconds that it took."""
    start = time.perf_counter()
    for result in results:
        yield replace(result, took=time.perf_counter() - start)
        start = time.perf_counter()


def error(found: Tensor, expected: Tensor) -> float:
    """Returns the RMS over rows of RMS(found − expected) / RMS(expected), so that rows of small
    numbers count as much as others. It is NaN or infinite if `found` has NaN or infinity."""
    norm = partial(torch.linalg.vector_norm, dim=-1)
    rows = norm(found.float() - expected.float()) / norm(expected.float())
    return float(rows.square().mean().sqrt())


@contextmanager
def full_precision() -> Iterator[None]:
    """Computes float32 matmuls in full precision, even if the caller has allowed TF32 or bf16."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)
