"""Tests the kernel benchmarks without a GPU: status and speed of each provider, and the reports.

A suite is the benchmark of one op; a provider is an implementation of the op.
"""

import json
from dataclasses import replace

import pytest
import torch
from example_suite import PROVIDERS, SUITE
from triton_interpreter import interpreter

from gemma_fast.benchmarks.kernels import suite as harness
from gemma_fast.benchmarks.kernels.rivals import by_pointers
from gemma_fast.benchmarks.kernels.suite import KernelResult, run
from gemma_fast.benchmarks.kernels.table import SUITES
from gemma_fast.benchmarks.measure import outcome, report
from gemma_fast.benchmarks.measure.machine import Roof, Work
from gemma_fast.benchmarks.measure.outcome import COPY, EAGER, OURS, OURS_ALONE
from gemma_fast.benchmarks.measure.plots import kernel_plots, write_plots
from gemma_fast.benchmarks.measure.timing import Times
from gemma_fast.kernels.launch import Gpu, launch_config

NO_WAIT = {"PDL": False}
CPU, FP32 = torch.device("cpu"), torch.float32
ROOF = Roof(copy=2e12, product=1e15)
STAMP = {
    "gpu": "GPU", "cpu": None, "driver": "580", "cuda": "13.0", "cudnn": 9, "torch": "2.13",
    "triton": "3.7", "python": "3.12", "rivals": {"quack-kernels": "0.6"}, "dtype": "bfloat16",
    "commit": "abc", "date": "2026-11-21",
}  # fmt: skip


def statuses(suite=SUITE, size="small", **options):
    return {r.provider: r.status for r in run(suite, size, CPU, FP32, None, **options)}


def test_every_provider_is_listed_with_its_status():
    found = statuses()
    assert list(found) == [*PROVIDERS, COPY]
    assert found[EAGER] == found[OURS] == "ok, not measured"
    assert found["off"] == "wrong: error 0.0005 exceeds the limit 1e-05"
    assert found["NaN"] == "wrong: error nan exceeds the limit 1e-05"
    assert found["infinite"] == "wrong: error inf exceeds the limit 1e-05"
    assert found["other shape"].startswith("wrong: gives")
    assert found["other dtype"].startswith("wrong: gives")
    assert found["two outputs"].startswith("wrong: gives")
    assert found["absent"] == "not installed: No module named 'rival'"
    assert found["unable"] == "cannot: no window"
    assert found["broken"] == "failed: illegal instruction"


def test_traceback_of_a_failed_provider_is_printed_to_stderr(capsys):
    statuses(names=["broken", "absent"])
    told = capsys.readouterr().err
    assert "and a long story" in told and "in broken" in told and "No module" not in told


def test_error_of_the_oracle_is_the_status_of_every_provider():
    def too_large(x):
        raise MemoryError("too large")

    found = statuses(replace(SUITE, oracle=too_large), names=[EAGER, OURS])
    assert found == {EAGER: "failed: too large", OURS: "failed: too large"}


def test_wrong_providers_are_not_timed(monkeypatch):
    timed = []

    def calls(suite, name, *_):
        timed.append(name)
        return [lambda: None]

    times = Times(1e-3, 1e-3, 1e-3)
    monkeypatch.setattr(harness, "calls", calls)
    monkeypatch.setattr(harness, "device_times", lambda calls, check: (times, True))
    results = list(run(SUITE, "large", CPU, FP32, ROOF))
    assert timed == [EAGER, OURS, COPY]
    assert sorted(r.provider for r in results if r.times) == sorted(timed)
    assert all(r.graph for r in results if r.times)


def test_oracle_gets_its_own_fp32_copies_of_the_inputs():
    seen = []

    def oracle(x):
        seen.append(x.dtype)
        return x.mul_(2)

    for dtype in (torch.bfloat16, torch.float32):
        (result,) = run(replace(SUITE, oracle=oracle), "small", CPU, dtype, None, [OURS])
        assert result.status == "ok, not measured"
    assert seen == [torch.float32] * 2


def test_provider_faster_than_the_roof_is_wrong(monkeypatch):
    """For example, an empty CUDA graph is faster than the roof (the machine's peak rates)."""
    monkeypatch.setattr(harness, "calls", lambda *_: [lambda: None])
    monkeypatch.setattr(
        harness, "device_times", lambda calls, check: (Times(1e-6, 1e-6, 1e-6), True)
    )
    (found,) = run(SUITE, "large", CPU, FP32, ROOF, [OURS])  # 8 MiB take 4.2 µs at 2 TB/s
    assert found.status == "wrong: 4.2 times the roof's speed" and found.times is None


def test_output_of_the_timed_graph_is_checked_for_gemma_fast(monkeypatch):
    def device_times(calls, check):
        check(torch.tensor([1.0, 2.01]))
        return Times(1e-3, 1e-3, 1e-3), True

    monkeypatch.setattr(harness, "calls", lambda *_: [lambda: torch.tensor([1.0, 2.0])])
    monkeypatch.setattr(harness, "device_times", device_times)
    eager, ours = run(SUITE, "large", CPU, FP32, ROOF, [EAGER, OURS])
    assert ours.status == "wrong: error 0.0045 in the timed graph" and ours.times is None
    assert eager.status == "ok"  # not checked: others may change their inputs


def test_by_pointers_launches_without_descriptors():
    """`by_pointers` turns tensor descriptors off during the call, and on again after it."""
    found = []
    call = by_pointers("double", lambda x: lambda: found.append(launch_config("double", {})))(1)
    call()
    assert found == [launch_config("double", {}) | {"DESCRIPTORS": False}]
    assert "DESCRIPTORS" not in launch_config("double", {})


@pytest.mark.parametrize("name", ["linear", "norm_linear", "decode_attention"])
def test_provider_without_overlap_does_not_use_pdl(name, monkeypatch):
    """The provider OURS_ALONE must not use programmatic dependent launch."""
    given, suite = [], SUITES[name]
    monkeypatch.setattr(Gpu, "pdl_options", lambda _, pdl: given.append(pdl) or NO_WAIT)
    for provider in (OURS, OURS_ALONE):
        size = next(iter(suite.tiny.values()))
        call = suite.providers[provider](*suite.inputs(**size, device=CPU, dtype=FP32))
        with interpreter():
            call()
    assert given == [True, False]


def test_error_weighs_rows_of_small_and_large_numbers_equally():
    expected = torch.tensor([[1000.0, 1000.0], [1.0, 1.0]])
    found = torch.tensor([[1000.0, 1000.0], [1.5, 1.0]])
    assert outcome.error(found, expected) == pytest.approx(0.25)  # √((0 + 0.125) / 2)


def test_tolerance_is_two_to_three_rounding_errors():
    for dtype, one_rounding in [(torch.bfloat16, 1.7e-3), (torch.float16, 2.1e-4)]:
        exact = torch.randn(64, 1024)
        off = outcome.error(exact.to(dtype), exact)
        assert off == pytest.approx(one_rounding, rel=0.1)
        assert off * 2 < harness.TOLERANCE[dtype] < off * 3.1


def result(provider, seconds=None, status="ok", suite="rms_norm", size="8192 x 2048", flops=4e7):
    times = seconds and Times(seconds, seconds * 0.9, seconds * 1.1)
    return KernelResult(suite, size, provider, status, Work(6e7, flops), 1e-3, times, bool(times))


def test_rates_and_share_of_the_roof_follow_from_the_time():
    x = result(OURS, seconds=40e-6).figures(ROOF)
    assert x["median_us"] == pytest.approx(40)
    assert x["GB_per_s"] == pytest.approx(1500)  # 6e7 bytes / 40e-6 s
    assert x["TFLOP_per_s"] == pytest.approx(1)  # 4e7 FLOPs / 40e-6 s
    assert x["bound"] == "memory" and x["share_of_roof"] == pytest.approx(0.75)
    x = result(OURS, seconds=40e-6, flops=2e10).figures(ROOF)  # FLOPs 20 µs, bytes 30 µs
    assert x["bound"] == "memory"
    x = result(OURS, seconds=400e-6, flops=2e11).figures(ROOF)
    assert x["bound"] == "compute" and x["share_of_roof"] == pytest.approx(0.5)
    assert result(OURS).figures(ROOF) == {}


def test_speedup_is_relative_to_eager_at_the_same_size():
    results = [
        result(EAGER, 80e-6), result(OURS, 20e-6), result("liger", status="not installed: x"),
        result(OURS, 10e-6, size="1 x 1"),
    ]  # fmt: skip
    found = report.speedups(results)
    assert found[("rms_norm", "8192 x 2048"), OURS] == pytest.approx(4)
    assert len(found) == 2


def test_results_are_written_as_files_and_plots(tmp_path):
    results = [
        result(EAGER, 80e-6), result(OURS, 40e-6), replace(result("quack", 50e-6), graph=False),
        result("liger", status="not installed: No module named 'liger_kernel'"),
        result(COPY, 38e-6, flops=0),
        result(EAGER, 3e-3, suite="attention", size="a", flops=1e11),
        result(OURS, 2e-3, suite="attention", size="a", flops=1e11),
    ]  # fmt: skip
    about = {"rms_norm": "RMSNorm", "attention": "Attention"}
    stamp = STAMP | {"roof_at_the_end": {"copy": 1.9e12, "product": 9e14}}
    report.kernel_report(stamp, ROOF, results, about).write(tmp_path)
    write_plots(kernel_plots, tmp_path, ROOF, results, "GPU")

    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["stamp"] == stamp
    assert saved["roof"] == ROOF._asdict()
    assert [x["provider"] for x in saved["results"]] == [r.provider for r in results]
    assert saved["results"][1]["x_eager"] == pytest.approx(2)
    assert saved["results"][2]["graph"] is False
    assert "median_us" not in saved["results"][3]

    text = (tmp_path / "results.md").read_text()
    ours = "| 8192 x 2048 | gemma_fast | 40.0 µs (36.0 … 44.0) | 1500 | 1 | 0.75 (memory) | 2.00 |"
    assert ours in text
    assert "| quack \\* | 50.0 µs" in text and report.CALL_BY_CALL in text
    assert "| liger | not installed: No module named 'liger_kernel' |" in text
    assert "## attention" in text and report.NOTHING not in text
    assert "commit abc" in text and "copy 2000 GB/s, matmul 1000 TFLOP/s" in text
    assert "At the end: copy 1900 GB/s, matmul 900 TFLOP/s." in text and "quack-kernels 0.6" in text
    for name in ("speedup.png", "roofline.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) <= 8


def test_each_result_contains_the_seconds_that_it_took(monkeypatch):
    clock = iter([0.0, 3.0, 3.0, 10.0, 10.0])
    monkeypatch.setattr(outcome.time, "perf_counter", lambda: next(clock))
    results = outcome.with_took(run(SUITE, "small", CPU, FP32, None, [EAGER, OURS]))
    assert [r.took for r in results] == [3, 7]
