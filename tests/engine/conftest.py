"""One family, and CUDA graphs without a GPU."""

import pytest
from decoder_checks import Graph
from tiny_models import CONFIGS, Twins

from gemma_fast.engine.decoder import Decoder


@pytest.fixture(scope="session", params=["gemma3-gqa"])
def twins(request, tmp_path_factory) -> Twins:
    """The richest family: most tests of this room do not depend on it."""
    return Twins.build(CONFIGS[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture
def graphs(monkeypatch) -> list[Graph]:
    """Decoders on the CPU go about as on a GPU."""
    made: list[Graph] = []

    def capture(self):
        self._graph_bytes += 7
        made.append(Graph(self))
        return made[-1]

    init = Decoder.__init__

    def asynchronous(self, *args):
        init(self, *args)
        self.asynchronous = True

    def read(self):
        token = self.token.clone()
        return lambda: token

    monkeypatch.setattr(Decoder, "_capture", capture)
    monkeypatch.setattr(Decoder, "__init__", asynchronous)
    monkeypatch.setattr(Decoder, "read", read)
    return made
