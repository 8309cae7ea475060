"""Defines fixtures for the engine tests: models of one family, and simulated CUDA graphs."""

import pytest
from decoder_checks import Graph
from tiny_models import CONFIGS, Twins

from gemma_fast.engine.decoder import Decoder
from gemma_fast.engine.graphs import StepGraphs


@pytest.fixture(scope="session", params=["gemma3-gqa"])
def twins(request, tmp_path_factory) -> Twins:
    """Replaces the fixture of tests/conftest.py, because most tests in this folder do not depend on
    the family. Uses only gemma3-gqa, the config with the most features."""
    return Twins.build(CONFIGS[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture
def graphs(monkeypatch) -> list[Graph]:
    """Makes decoders on the CPU asynchronous, as decoders on a GPU are. Returns the list of graphs
    that the decoders capture."""
    made: list[Graph] = []

    def capture(self, step, cache):
        self.nbytes += 7
        made.append(Graph(step, cache))
        return made[-1]

    init = Decoder.__init__

    def asynchronous(self, *args):
        init(self, *args)
        self.asynchronous = True

    monkeypatch.setattr(StepGraphs, "capture", capture)
    monkeypatch.setattr(Decoder, "__init__", asynchronous)
    return made
