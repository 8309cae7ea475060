"""Replaces a fixture, so that the tests in this folder run with one model family."""

import pytest
from tiny_models import CONFIGS, Twins


@pytest.fixture(scope="session", params=["gemma3-gqa"])
def twins(request, tmp_path_factory) -> Twins:
    """Overrides the fixture of tests/conftest.py. Uses only the config with the most features.

    Most tests in this folder do not depend on the family.
    """
    return Twins.build(CONFIGS[request.param], tmp_path_factory.mktemp(request.param))
