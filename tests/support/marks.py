"""Marks: values that only `make test-all` takes, and which families a test runs on."""

import pytest
from tiny_models import CONFIGS


def slow(*values) -> list:
    """Parameters of tests that the default run leaves out."""
    return [
        pytest.param(*x if isinstance(x, tuple) else (x,), marks=pytest.mark.slow) for x in values
    ]


# The `twins` of a test; without a mark it runs on those of its room's conftest.py.
ALL_FAMILIES = pytest.mark.parametrize("twins", list(CONFIGS), indirect=True)
# For the interpreter: a soft cap and post-norms, and q and k norms; both with windows.
RICHEST_FAMILIES = pytest.mark.parametrize(
    "twins",
    ["gemma2-gqa", "gemma3-gqa", *slow("gemma-mqa", "gemma-mha", "gemma3-mqa")],
    indirect=True,
)
