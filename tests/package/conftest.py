"""One family."""

import pytest
from tiny_models import CONFIGS, Twins


@pytest.fixture(scope="session", params=["gemma3-gqa"])
def twins(request, tmp_path_factory) -> Twins:
    """The richest family: most tests of this room do not depend on it."""
    return Twins.build(CONFIGS[request.param], tmp_path_factory.mktemp(request.param))
