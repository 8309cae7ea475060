"""Defines the fixtures `hopper` (Hopper's limits) and `poison_outputs` (outputs start as NaN)."""

import pytest
import torch
from kernel_checks import HOPPERS
from triton_interpreter import interpreter

from gemma_fast.kernels.launch import as_on, gpu


@pytest.fixture(params=HOPPERS)
def hopper(request):
    """Launches kernels with Hopper's limits. Returns the device: a GPU with tensor descriptors, or
    the CPU, where the interpreter runs the kernels."""
    if torch.cuda.is_available() and not 90 <= gpu(torch.device("cuda", 0)).capability < 120:
        pytest.skip("needs tensor descriptors and Hopper's shared memory")
    with as_on(HOPPERS[request.param]), interpreter():
        yield "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poison_outputs(monkeypatch):
    """Fills floating-point outputs (torch.empty) with NaN, so elements that a kernel does not write
    stay NaN. Afterwards checks that no kernel wrote past the end of an output."""
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
