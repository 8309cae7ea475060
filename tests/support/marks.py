"""Marks: parameters that only `make test-all` runs, and the model families of a test."""

import pytest
from tiny_models import CONFIGS


def slow(*values) -> list:
    """Returns test parameters that the default run skips."""
    return [
        pytest.param(*x if isinstance(x, tuple) else (x,), marks=pytest.mark.slow) for x in values
    ]


# Families for the fixture `twins`. Without a mark, the nearest conftest.py decides.
ALL_FAMILIES = pytest.mark.parametrize("twins", list(CONFIGS), indirect=True)
# For the slow interpreter: Gemma 2 has a soft cap, Gemma 3 q and k norms; both have windows.
RICHEST_FAMILIES = pytest.mark.parametrize(
    "twins",
    ["gemma2-gqa", "gemma3-gqa", *slow("gemma-mqa", "gemma-mha", "gemma3-mqa")],
    indirect=True,
)
