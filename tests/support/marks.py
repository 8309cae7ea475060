"""Defines marks for parameters that only `make test-all` runs, and for the families of a test."""

import pytest
from tiny_models import CONFIGS


def slow(*values) -> list:
    """Returns test parameters that only `make test-all` runs."""
    return [
        pytest.param(*x if isinstance(x, tuple) else (x,), marks=pytest.mark.slow) for x in values
    ]


# Families for the fixture `twins`. Without this mark, the nearest conftest.py selects them.
ALL_FAMILIES = pytest.mark.parametrize("twins", list(CONFIGS), indirect=True)
# Families for tests in the slow interpreter. Gemma 2 has soft caps, Gemma 3 has q and k norms, and
# both have windows.
RICHEST_FAMILIES = pytest.mark.parametrize(
    "twins",
    ["gemma2-gqa", "gemma3-gqa", *slow("gemma-mqa", "gemma-mha", "gemma3-mqa")],
    indirect=True,
)
