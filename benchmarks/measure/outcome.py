"""Outcome of a provider's run: its status and its error.

`serious` returns whether the results make the whole benchmark run fail.

A status is one line of text that begins with one of these words:

    ok             the output is correct; the provider was timed, if there is a roof
    wrong          the output differs from the oracle's, or the time is too short to be true
    cannot         the provider does not support this op or size (NotImplementedError)
    not installed  a package of the provider is missing (ImportError)
    failed         the provider raised any other exception
"""

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
UNPACKED = "gemma_fast, unpacked"  # a packed checkpoint's weights, unpacked
TRANSFORMERS, LLAMA_CPP = "transformers (sdpa)", "llama.cpp"
ONE_BY_ONE = "gemma_fast, one by one"  # generate() for each prompt
GENERATE_BATCH = "transformers (generate_batch)"  # its continuous batching
OURS_BY_POINTERS = "gemma_fast, no descriptors"
# Without programmatic dependent launch: no call overlaps the previous call. Rivals' calls do not
# overlap either.
OURS_ALONE = "gemma_fast, no overlap"
COPY = "copy of the same bytes (yardstick)"
NOT_MEASURED, WITHOUT_GRAPHS = "ok, not measured", "ok, Inductor skipped CUDA graphs"
R = TypeVar("R", bound=Any)


class Wrong(Exception):
    """Raised if an output differs from the oracle's, or if a time is too short to be true."""


def verdict(problem: Exception) -> str:
    """Returns the status for an exception. If it is "failed", prints the traceback to stderr."""
    text = str(problem).strip().split("\n")[0] or type(problem).__name__
    kinds = {Wrong: "wrong", ImportError: "not installed", NotImplementedError: "cannot"}
    word = next((word for kind, word in kinds.items() if isinstance(problem, kind)), "failed")
    if word == "failed":
        traceback.print_exception(problem)
    return f"{word}: {text}"


def serious(results: Iterable[Any]) -> bool:
    """Returns whether the whole run fails: any result is wrong, or one of ours is not ok."""
    return any(
        r.status.startswith("wrong")
        or (r.provider in (OURS, UNPACKED, ONE_BY_ONE) and not r.status.startswith("ok"))
        for r in results
    )


def with_took(results: Iterable[R]) -> Iterator[R]:
    """Yields the results, with `took` set to the seconds spent on each result."""
    start = time.perf_counter()
    for result in results:
        yield replace(result, took=time.perf_counter() - start)
        start = time.perf_counter()


def error(found: Tensor, expected: Tensor) -> float:
    """Returns RMS(found − expected) / RMS(expected) of each row (along the last dim), combined by
    an RMS over all rows. So rows of small numbers count as much as rows of large numbers. The error
    is NaN or infinite if `found` contains NaN or infinity."""
    norm = partial(torch.linalg.vector_norm, dim=-1)
    rows = norm(found.float() - expected.float()) / norm(expected.float())
    return float(rows.square().mean().sqrt())


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside the `with` block, float32 matmuls have full precision, even if the caller has allowed
    TF32 or bf16."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)
