"""Tests that every kernel suite (the benchmark of one op) runs, and that its inputs are valid.
Also tests the formulas for the minimum bytes and FLOPs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_interpreter import interpreter

from gemma_fast.benchmarks.kernels import suite as harness
from gemma_fast.benchmarks.kernels.suite import run
from gemma_fast.benchmarks.kernels.table import SUITES
from gemma_fast.benchmarks.measure.outcome import EAGER, OURS

CPU, FP32 = torch.device("cpu"), torch.float32
CASES = [(name, size) for name, suite in SUITES.items() for size in suite.tiny]


@pytest.mark.parametrize(("name", "size"), CASES, ids=str)
def test_tiny_sizes_run_in_the_interpreter(name, size):
    with interpreter():  # runs the kernels, not their references
        results = list(run(SUITES[name], size, CPU, FP32, None, [EAGER, OURS]))
    assert [r.status for r in results] == ["ok, not measured"] * 2


@pytest.mark.parametrize("name", SUITES)
def test_suite_inputs_are_repeatable_and_not_zero(name):
    suite = SUITES[name]
    for size in suite.tiny.values():
        inputs = harness.make_inputs(suite, size, CPU, FP32, seed=0)
        tensors = [x for x in inputs if isinstance(x, torch.Tensor) and x.is_floating_point()]
        assert all(x.abs().sum() > 0 for x in tensors)
        again = harness.make_inputs(suite, size, CPU, FP32, seed=0)
        assert all(torch.equal(a, b) for a, b in zip(inputs, again, strict=True)
                   if isinstance(a, torch.Tensor))  # fmt: skip
    assert all(min(suite.work(2, **size)) > 0 for size in suite.sizes.values())


def work(name, size):
    return SUITES[name].work(2, **SUITES[name].sizes[size])


def test_bytes_and_flops_equal_numbers_computed_by_hand():
    m = 1 << 20
    assert work("rms_norm", "512 x 2048") == (4 * m, 4 * m)  # x and out: 1 Mi elements each
    assert work("add_rms_norm", "512 x 2048") == (8 * m, 5 * m)
    assert work("add_rms_norm_post", "8192 x 640") == (40 * m, 45 * m)
    assert work("geglu", "512 x 2*16384") == (3 * 8 * m * 2, 10 * 8 * m)
    # k, v, keys and values have 0.5 Mi elements each, cos and sin 0.25 Mi floats each
    assert work("rotary_write", "t 2048, n 1") == (4 * m + 2 * m, 3 * m // 2)
    # q and out have 1 Mi elements each, keys and values 1/8 Mi, cos and sin 1/16 Mi floats
    pairs = 512 * 513 // 2
    found = work("attention", "t 512, 8/1 heads, d 256")
    assert found == (2 * (2 * m + m // 4) + m // 2, 4 * 8 * 256 * pairs)
    # the first 512 queries see 1 to 512 keys, the other 7680 queries see 512 keys each
    found = work("attention", "t 8192, 4/1 heads, d 256, window 512")
    assert found.flops == 4 * 4 * 256 * (pairs + 7680 * 512)
    # int4: half a byte and, for each 32 columns, a scale of 2 bytes; x and y in 16 bits
    found = work("linear_int4", "16384 x 2048, b 8, int4, group 32")
    assert found == (16 * m + 2 * m + 2 * 8 * (16384 + 2048), 2 * 8 * 32 * m)
    found = work("linear_int8", "2048 x 32768, b 1, int8, a scale per row")
    assert found.bytes == 64 * m + 2 * 32768 + 2 * (2048 + 32768)
    # An expert has 3 * 704 * 2816 weights, the dense projection 2112 * 2816. A row has x, y and the
    # dense y, 2112 dense columns, and 8 choices of 8 bytes.
    expert, dense, row = 3 * 704 * 2816, 2112 * 2816, 2 * (3 * 2816 + 2112) + 64
    found = work("experts", "b 8, 64 of 128")
    assert found == (2 * (64 * expert + dense) + 8 * row, 2 * 8 * (8 * expert + dense))
    found = work("experts_int4", "b 1, 8 of 128")
    assert found.bytes == (0.5 + 2 / 32) * (8 * expert + dense) + row
    found = work("experts_prompt", "t 512, 128 of 128")
    assert found == (256 * expert + 512 * (4 * 2816 + 64), 2 * 512 * 8 * expert)
    # gate, up and the router's 128 rows; four norms and each expert's scale; x, the residual, h and
    # the experts' input; 2112 columns of the dense MLP
    found = work("norm_router", "2816 x 4224, b 8, 8 of 128")
    weights = (4224 + 128) * 2816
    assert found == (
        2 * (weights + 4 * 2816 + 128 + 8 * (4 * 2816 + 2112)) + 8 * 64, 2 * 8 * weights
    )  # fmt: skip
    found = work("gate_up_geglu", "m 512, k 2048, dim 16384")
    assert found == (2 * (m + 64 * m + 8 * m), 2 * 512 * 2048 * 32768)


@pytest.mark.slow
def test_suites_run_under_pytest_benchmark(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # runs the kernels, not their references
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # disables pytest-benchmark
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "--benchmark-only"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "nothing was measured" in done.stdout and " passed" in done.stdout
