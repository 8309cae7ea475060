"""Tests `python -m benchmarks.profile` without a GPU: it divides the time among the kernels.

A round is one profiled call, either a decode step or the prefill of a prompt.
"""

import pytest
import torch
from click.testing import CliRunner

from gemma_fast.benchmarks import profile
from gemma_fast.benchmarks.profile import ROUNDS, Share, kernel_table, kernels, prepare, shares


def event(name, start, end, category="kernel", grid=(8, 1, 1)):
    args = {"grid": list(grid)} if category == "kernel" else {}
    return {"cat": category, "name": name, "ts": start, "dur": end - start, "args": args}


def test_overlapping_time_counts_for_the_earlier_kernel():
    of_a_round = [
        event("matmul", 10, 20),
        event("attention", 14, 23),  # starts while the matmul runs
        event("matmul", 15, 22),  # ends before attention ends, so it adds no time
        event("aten::mm", 0, 100, "cpu_op"),
        event("matmul", 25, 30, grid=(2, 1, 1)),
        event("Memcpy DtoH", 30, 31, "gpu_memcpy"),
        {"cat": "ac2g", "name": "matmul", "ts": 1},
    ]
    trace = [{**x, "ts": x["ts"] + 100 * i} for i in range(ROUNDS) for x in reversed(of_a_round)]
    found = shares(kernels({"traceEvents": trace}))
    # each of the ROUNDS - 1 gaps between rounds is 79 µs; `shares` divides their sum by ROUNDS
    idle = (110 - 31) * (ROUNDS - 1) / ROUNDS
    assert found == [
        Share("matmul", "8x1x1", 2, 10, pytest.approx(idle)),
        Share("matmul", "2x1x1", 1, 5, 2),
        Share("attention", "8x1x1", 1, 3, 0),
        Share("Memcpy DtoH", "", 1, 1, 0),
    ]
    lines = kernel_table(found, clock=100).splitlines()
    assert lines[2].startswith("| matmul | 8x1x1 | 2 | 5.00 | 10.0 | 10.4% |")
    assert lines[-1] == (
        "Sum 96.0 µs, of which idle 77.0; wall clock without the profiler: 100.0 µs."
    )


@pytest.mark.parametrize("prompt", [0, 7], ids=["decode", "prefill"])
def test_each_profiled_call_is_one_decode_step_or_one_prompt(prompt):
    cpu = torch.device("cpu")
    begin, work = prepare("tiny", prompt, depth=5, batch=2, device=cpu, dtype=torch.float32)
    cache = begin.func.__self__.decoder.cache
    for _ in range(2):
        begin()
        for token in range(ROUNDS):
            assert cache.length == (prompt or 5 + token)
            work()


def test_tokens_that_exceed_the_context_are_refused_before_loading():
    cpu = torch.device("cpu")
    message = "8193 tokens do not fit the context of gemma-2b, 8192"
    for prompt, depth in ((8193, 1), (0, 8193 - ROUNDS)):
        with pytest.raises(ValueError, match=message):
            prepare("gemma-2b", prompt, depth, batch=1, device=cpu, dtype=torch.float32)


def test_command_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(profile.main, ["-p", "512"])
    assert done.exit_code and "profiling needs a CUDA GPU, and there is none" in done.output


def test_depth_of_a_prefill_is_refused():
    done = CliRunner().invoke(profile.main, ["-p", "512", "-d", "4096"])
    assert done.exit_code == 2 and "-d is for a decode step, not for a prefill" in done.output
