"""Tests `python -m benchmarks.tune`, which times launch configs of kernels, without a GPU."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from example_suite import SUITE
from marks import slow
from triton.runtime.errors import OutOfResources
from triton_interpreter import interpreter

from gemma_fast.benchmarks import tune
from gemma_fast.benchmarks.kernels import suite as harness
from gemma_fast.benchmarks.kernels.suite import Tuning, run
from gemma_fast.benchmarks.kernels.table import SUITES
from gemma_fast.benchmarks.measure.machine import Roof
from gemma_fast.benchmarks.measure.outcome import OURS
from gemma_fast.benchmarks.measure.timing import Times
from gemma_fast.benchmarks.tune import TABLE, result_lines, time_configs, variants
from gemma_fast.kernels import matvec
from gemma_fast.kernels.launch import launch_config, override
from gemma_fast.kernels.packed import Weight

CPU, FP32 = torch.device("cpu"), torch.float32
CUDA = torch.cuda.is_available()
# device and dtype of the kernels
WHERE = (torch.device("cuda"), torch.bfloat16) if CUDA else (CPU, FP32)
CASES = [(name, size) for name in SUITES for size in SUITES[name].tiny]


def test_every_suite_has_launch_configs_to_try():
    assert all(suite.tuning for suite in SUITES.values())


# The interpreter takes long for these cases: they have the most launch configs or programs.
SLOW = {
    ("lm_head", "199 x 64, b 1, sampled"), ("lm_head", "199 x 64, b 3"),
    ("norm_linear", "64 x 48, b 1"), ("decode_attention", "b 2, depth 24, 4/2 heads, d 32"),
}  # fmt: skip
CASES = [x for case in CASES for x in (slow(case) if case in SLOW else [case])]


@pytest.mark.parametrize(("name", "size"), CASES, ids=str)
def test_every_launch_config_gives_correct_results(name, size):
    suite = variants(SUITES[name], SUITES[name].tiny[size])
    with interpreter():
        results = list(run(suite, size, *WHERE, None))
    assert len(results) > 4
    found = {r.status.split(":")[0] for r in results if r.provider != TABLE}
    assert found == {"ok, not measured"} or (CUDA and found == {"ok, not measured", "cannot"})
    assert results[0].status == "ok, not measured"


def test_override_replaces_the_given_values_of_the_launch_config():
    """All other values come from the kernel's table. If a config cannot compile, its status is
    `failed`."""
    table = launch_config("matvec", matvec.default_config(1, Weight(torch.empty(48, 64)), 4))
    with override(SUITES["linear"].tuning.kernel, BLOCK_N=2):
        assert launch_config("matvec", table) == table | {"BLOCK_N": 2}
    assert launch_config("matvec", table) == table
    odd = Tuning("matvec", lambda size: {"BLOCK_N": (3,)})
    with interpreter():
        suite = variants(replace(SUITES["linear"], tuning=odd), {})
        ours, tried = run(suite, "64 x 48, b 1", *WHERE, None)
    assert ours.status == "ok, not measured" and tried.status.startswith("failed: ")


def test_config_that_exceeds_shared_memory_is_not_a_failure():
    def too_large(x):
        raise OutOfResources(300_000, 232_448, "shared memory")

    tuning = Tuning("double", lambda size: {"BLOCK": (1,)})
    suite = replace(SUITE, providers={OURS: lambda x: lambda: too_large(x)}, tuning=tuning)
    suite = variants(suite, {})
    _, tried = run(suite, "small", CPU, FP32, None)
    assert tried.status.startswith("cannot: out of resource: shared memory, Required: 300000")


def block(i: int) -> str:
    return f"gemma_fast, BLOCK {i}"


@pytest.fixture
def timed(monkeypatch):
    """Returns a suite that tries BLOCK = 1 … 6, and the list of the providers that were timed.

    BLOCK 1 gives wrong results; BLOCK 2 is the fastest at first, but slow when timed again.
    """
    first = {TABLE: 9, block(2): 1, block(3): 3, block(4): 4, block(5): 5, block(6): 6}
    seen = []

    def double(x):
        return x * 2 if launch_config("double", {"BLOCK": 3})["BLOCK"] > 1 else x * 3

    def calls(suite, name, *_):
        seen.append(name)
        return name

    def device_times(name, check):
        again = {block(2): 8, block(4): 2}.get(name) if seen.count(name) > 1 else None
        return Times(*[1e-3 * (again or first[name])] * 3), True

    monkeypatch.setattr(harness, "calls", calls)
    monkeypatch.setattr(harness, "device_times", device_times)
    tuning = Tuning("double", lambda size: {"BLOCK": range(1, 7)})
    providers = {OURS: lambda x: lambda: double(x)}
    return variants(replace(SUITE, providers=providers, tuning=tuning), {}), seen


def test_fastest_configs_are_timed_again(timed):
    suite, seen = timed
    found = time_configs(suite, "large", CPU, FP32, Roof(copy=1e10, product=1e15))
    assert [seen.count(name) for name in (TABLE, *map(block, range(1, 7)))] == [
        4, 0, 4, 4, 4, 4, 1,
    ]  # fmt: skip
    again = [(x["tile"], round(x["again_us"])) for x in found if "again_us" in x]
    assert again == [
        (block(4), 2000), (block(3), 3000), (block(5), 5000), (block(2), 8000), (TABLE, 9000),
    ]  # fmt: skip
    assert [x["tile"] for x in found[5:]] == [block(6), block(1)]
    lines = list(result_lines(found))
    assert len(lines) == 6 and lines[0].split() == [
        "2000.00", "µs", "0.419", "of", "the", "roof", "gemma_fast,", "BLOCK", "4",
    ]  # fmt: skip
    assert lines[-1].startswith("  1 of 7 not measured, the first: wrong: error ")


def test_command_refuses_bad_arguments_and_selects_sizes(monkeypatch):
    def told(*names: str) -> str:
        done = CliRunner().invoke(tune.main, names)
        assert done.exit_code
        return done.output

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "tuning needs a CUDA GPU, and there is none" in told("linear")
    assert "no suite lineal: choose from attention, " in told("lineal")
    unused = told("linear", "--size", "b 3", "--size", "b 1")
    assert "no size has b 3 in its name" in unused
    sizes = list(tune.chosen(["linear", "attention"], ["b 1", "t 8192, 8/1 heads, d 256"]))
    assert sizes == [
        ("attention", "t 8192, 8/1 heads, d 256"),
        *(("linear", f"{dims}, b 1") for dims in ("16384 x 2048", "2048 x 2048", "2048 x 640")),
    ]


def test_compile_ahead_launches_the_given_config(monkeypatch):
    launched = []
    monkeypatch.setattr(
        matvec, "_launch", lambda *given: launched.append(launch_config("matvec", {"BLOCK_N": 4}))
    )
    tiny = SUITES["linear"].tiny["64 x 48, b 1"]
    name = next(x for x in SUITES["linear"].tuning.candidates(tiny) if "BLOCK_N 2," in x)
    with interpreter(), pytest.raises(TypeError):  # because the replacement of _launch returns None
        tune.compile_ahead("linear", tiny, name, *WHERE)
    assert [x["BLOCK_N"] for x in launched] == [2]


class Idle:
    """Replaces ProcessPoolExecutor, and runs none of the submitted calls."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, work, *given):
        return SimpleNamespace(exception=lambda: None)


def test_results_are_printed_and_written(monkeypatch, tmp_path):
    roof = Roof(copy=1e12, product=1e15)
    monkeypatch.setattr(tune, "ProcessPoolExecutor", Idle)
    monkeypatch.setattr(tune, "device_and_dtype", lambda dtype: (torch.device("cuda"), FP32))
    monkeypatch.setattr(tune, "measure_roof", lambda *_: roof)
    monkeypatch.setattr(tune, "stamp", lambda *_: {"gpu": "H100"})
    monkeypatch.setattr(tune.report, "heading", lambda *_: "H100.")
    found = [{"tile": TABLE, "median_us": 2.0, "again_us": 2.0, "share_of_roof": 0.5}]
    monkeypatch.setattr(tune, "time_configs", lambda *_: found)
    done = CliRunner().invoke(tune.main, ["geglu", "--size", "512", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert (
        "geglu, 512 x 2*16384\n       2.00 µs  0.500 of the roof  gemma_fast, as the table has it"
        in done.output
    )
    saved = json.loads((tmp_path / "tune.json").read_text())
    assert saved["stamp"] == {"gpu": "H100"} and saved["roof"] == roof._asdict()
    assert saved["results"] == [{"suite": "geglu", "size": "512 x 2*16384", **found[0]}]
