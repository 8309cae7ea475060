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
# Runs a test with two families, because the interpreter is slow. `make test-all` runs it with all.
# Gemma 2 has soft caps, Gemma 3 has q and k norms, and both have windows.
RICHEST_FAMILIES = pytest.mark.parametrize(
    "twins",
    ["gemma2-gqa", "gemma3-gqa", *slow("gemma-mqa", "gemma-mha", "gemma3-mqa")],
    indirect=True,
)
