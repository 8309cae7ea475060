"""Defines `slow`, for parameters that only `make test-all` runs, and marks that select families."""

import pytest
from tiny_models import CONFIGS


def slow(*values) -> list:
    """Returns test parameters that only `make test-all` runs."""
    return [
        pytest.param(*x if isinstance(x, tuple) else (x,), marks=pytest.mark.slow) for x in values
    ]


# Runs a test with all families of the fixture `twins`. Without such a mark, the nearest conftest.py
# selects the families.
ALL_FAMILIES = pytest.mark.parametrize("twins", list(CONFIGS), indirect=True)
# Runs a test with four families, because the interpreter is slow. make test-all runs it with all.
# Gemma 2 has soft caps, Gemma 3 q and k norms, Gemma 4 layers of several shapes, or experts.
RICHEST_FAMILIES = pytest.mark.parametrize(
    "twins",
    [
        "gemma2-gqa",
        "gemma3-gqa",
        "gemma4-all",
        "gemma4-experts",
        *slow("gemma-mqa", "gemma-mha", "gemma3-mqa"),
        *slow("gemma4-k-eq-v", "gemma4-shared", "gemma4-per-layer"),
    ],
    indirect=True,
)
