"""These tests run with one family."""

import pytest
from tiny_models import CONFIGS, Twins


@pytest.fixture(scope="session", params=["gemma3-gqa"])
def twins(request, tmp_path_factory) -> Twins:
    """The family with the most features. Most tests of this folder do not depend on the family."""
    return Twins.build(CONFIGS[request.param], tmp_path_factory.mktemp(request.param))
