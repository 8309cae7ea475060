"""Tests the model benchmark: its formulas for rates, its errors and its reports.
Also runs every provider (implementation of the model) on a CPU."""

import json
import subprocess
from dataclasses import replace
from functools import partial

import pytest
import torch
from click.testing import CliRunner

from gemma_fast import cli
from gemma_fast.benchmarks.measure import machine, timing
from gemma_fast.benchmarks.measure.machine import Roof
from gemma_fast.benchmarks.measure.outcome import EAGER, OURS, WITHOUT_GRAPHS
from gemma_fast.benchmarks.measure.plots import model_plots, write_plots
from gemma_fast.benchmarks.measure.report import model_report
from gemma_fast.benchmarks.model import eager
from gemma_fast.benchmarks.model import race as bench_model
from gemma_fast.benchmarks.model.cases import Case, find
from gemma_fast.benchmarks.model.judge import Judge
from gemma_fast.benchmarks.model.providers import BESIDE_PACKED, PROVIDERS, RINGS, STATIC
from gemma_fast.benchmarks.model.race import ModelResult, percentile
from gemma_fast.benchmarks.options import bench
from gemma_fast.presets import PRESETS

ROOF = Roof(copy=2e12, product=1e15)
GEMMA = PRESETS["gemma-2b"]
TIMED = {"samples_s", "token_samples_s", "tokens_per_s", "tokens_per_s_sd"}


def result(case, provider, seconds=(), status="ok", token_seconds=()):
    return ModelResult(case, provider, status, case.work(GEMMA, 2), 0.03, seconds, token_seconds)


def test_throughput_latency_and_mfu_follow_from_the_times():
    case = Case("tg", 100, depth=512, batch=2)
    steps = (0.002,) * 98 + (0.003, 0.004)
    x = result(case, OURS, (0.2, 0.25), token_seconds=steps).figures(ROOF)
    assert x["tokens_per_s"] == pytest.approx(200 / 0.225)  # 0.225 s is the mean time
    assert x["tokens_per_s_sd"] == pytest.approx(100 * 2**0.5)
    assert x["token_p50_s"] == 0.002 and 0.003 <= x["token_p99_s"] < 0.004
    held = 2 * 18_432 * sum(range(513, 613)) / 100
    assert x["bytes_per_token"] == pytest.approx((5_012_344_832 + held) / 2)
    assert x["mbu"] == pytest.approx(100 * (5_012_344_832 + held) / 0.225 / 2e12)
    x = result(Case("pp", 512), OURS, (0.01,)).figures(ROOF)
    assert x["tokens_per_s"] == pytest.approx(51_200) and x["tokens_per_s_sd"] is None
    assert x["time_to_first_token_s"] == pytest.approx(0.01)
    assert x["mfu"] == pytest.approx(Case("pp", 512).work(GEMMA, 2).flops / 1e13)
    assert result(case, OURS).figures(ROOF) == {}
    assert percentile([3.0], 99) == 3.0


STAMP = {
    "gpu": "GPU", "cpu": None, "driver": "580", "cuda": "13.0", "cudnn": 9, "torch": "2.13",
    "triton": "3.7", "python": "3.12", "rivals": {"transformers": "5.23"}, "dtype": "bfloat16",
    "commit": "abc", "date": "2026-11-21",
}  # fmt: skip
ABOUT = {
    "model": "gemma-2b", "params": GEMMA.num_parameters, "dtype": "bfloat16",
    "size_bytes": 2 * GEMMA.num_parameters, "checked": "Checked against the reference in float32.",
}  # fmt: skip


def test_results_are_written_as_files_and_plots(tmp_path):
    read, write, deep = Case("pp", 512), Case("tg", 128), Case("tg", 128, depth=4096)
    steps = (0.0025,) * 128
    results = [
        result(read, EAGER, (0.02, 0.02)), result(write, EAGER, (1.28, 1.28), token_seconds=steps),
        result(write, "transformers (sdpa)", status="not installed: No module named 'x'"),
        result(read, OURS, (0.01, 0.01)), result(write, OURS, (0.32, 0.32), token_seconds=steps),
        result(deep, OURS, (0.32, 0.32), token_seconds=steps),
    ]  # fmt: skip
    results[4] = replace(results[4], peak_bytes=5_300_000_000)
    results.append(replace(result(deep, STATIC, (0.64,), WITHOUT_GRAPHS), token_seconds=steps))
    report = model_report(STAMP, ROOF, results, ABOUT)
    report.write(tmp_path)
    text = (tmp_path / "results.md").read_text()
    start = "| gemma-2b | 5.01 GB | 2.51 B | GPU | "
    assert (
        f"{start}gemma_fast | pp512 | 51200.00 ± 0.00 | 10 ms | – | 9.81 MB | – "
        "| 20.5% MFU | 2.00 |"
    ) in text
    assert (
        f"{start}gemma_fast | tg128 | 400.00 ± 0.00 | – | 2.5 ms / 2.5 ms | 5.01 GB | 5.30 GB "
        "| 100.3% MBU | 4.00 |"
    ) in text
    assert "| transformers (sdpa) | tg128 | not installed: No module named 'x' |" in text
    assert text.endswith("\\* Inductor skipped CUDA graphs.\n")
    assert "copy 2000 GB/s" in text and "commit abc" in text and "batch |" not in text
    order = [line.split(" | ")[4:6] for line in text.splitlines() if line.startswith(start)]
    assert order == [
        [EAGER, "pp512"], [OURS, "pp512"],
        [EAGER, "tg128"], ["transformers (sdpa)", "tg128"], [OURS, "tg128"],
        [OURS, "tg128 @ d4096"], [f"{STATIC} \\*", "tg128 @ d4096"],
    ]  # fmt: skip
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["stamp"] == STAMP and saved["roof"] == ROOF._asdict()
    ours = saved["results"][4]
    assert ours["samples_s"] == [0.32, 0.32] and ours["token_samples_s"] == [*steps]
    assert ours["x_eager"] == pytest.approx(4) and ours["peak_memory_bytes"] == 5_300_000_000
    assert not TIMED & saved["results"][3].keys()
    write_plots(model_plots, tmp_path, ROOF, results, "GPU")
    for name in ("speed.png", "depth.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "batch.png").exists()


@pytest.fixture
def roof(monkeypatch):
    """Hides the GPU, and replaces the measurement of the peak rates (the roof)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "measure_roof", lambda *_: ROOF)


@pytest.mark.slow
@pytest.mark.usefixtures("roof")
def test_command_measures_every_provider_on_a_cpu(tmp_path, monkeypatch):
    """Compiled steps use the backend "eager", because Inductor would take minutes."""
    quick = partial(torch.compile, backend="eager", fullgraph=True, dynamic=False)
    monkeypatch.setattr(eager, "compiled_step", quick)
    monkeypatch.setattr(timing, "ENOUGH", 0)
    options = "-p 8 -n 4 -d 0,5 -b 1,2 -r 2 -o json"
    arguments = ["bench", "--model", "tiny", *options.split(), "--out", str(tmp_path)]
    done = CliRunner().invoke(cli.main, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert found["stamp"]["roof_at_the_end"] == ROOF._asdict()
    rows = found["results"]
    names = [name for name in PROVIDERS if name not in BESIDE_PACKED]
    assert [row["test"] for row in rows[:: len(names)]] == [
        "pp8",
        "tg4",
        "pp8 @ d5",
        "tg4 @ d5",
    ] * 2
    assert [row["provider"] for row in rows] == names * 8
    unable = [row for row in rows if row["provider"] in (STATIC, RINGS) and row["kind"] == "pp"]
    assert {x["status"] for x in unable} == {"cannot: prefill is not compiled; see sdpa"}
    rows = [row for row in rows if row not in unable]
    assert all(row["status"] == "ok" and len(row["samples_s"]) == 2 for row in rows)
    assert all(row["x_eager"] == 1 for row in rows if row["provider"] == EAGER)
    for row in rows:
        measured = {"pp": {"time_to_first_token_s", "mfu"}, "tg": {"token_p99_s", "mbu"}}
        assert measured[row["kind"]] <= row.keys()
        assert len(row["token_samples_s"]) == (4 if row["kind"] == "tg" else 0)
    files = {"results.json", "results.md", "speed.png", "depth.png", "batch.png"}
    assert {x.name for x in tmp_path.iterdir()} == files


@pytest.mark.usefixtures("roof")
def test_without_the_model_option_nothing_is_measured_on_a_cpu():
    done = CliRunner().invoke(bench, ["-p", "4,4", "-n", "0", "--only", EAGER])
    assert done.exit_code == 0, done.output
    assert "| eager | pp4 | ok, not measured |" in done.stdout
    assert done.stdout.count("ok, not measured") == 1
    assert "nothing was measured" in done.stdout


@pytest.mark.usefixtures("roof")
def test_case_longer_than_the_context_is_listed_and_other_cases_run():
    options = f"-p 8,16384 -n 0 -d 0,8 --only {EAGER} --only {OURS}".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Judge, "prefix", lambda *_: 0)  # checking 16384 tokens takes minutes
        done = CliRunner().invoke(bench, options)
    assert done.exit_code == 0, done.output
    for name in (EAGER, OURS):
        long = f"| {name} | pp16384 @ d8 | cannot: 16392 tokens exceed the context of 16384 |"
        assert long in done.stdout and f"| {name} | pp8 @ d8 | ok, not measured |" in done.stdout


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("-p 0 -n 0", "nothing to test: -p and -n are 0"),
        ("-d 16384", "no test fits the context of tiny, 16384 tokens"),
    ],
)
@pytest.mark.usefixtures("roof")
def test_no_case_to_run_is_a_usage_error(options, complaint):
    done = CliRunner().invoke(bench, options.split())
    assert done.exit_code == 2 and complaint in done.output


def test_cuda_fault_is_listed_and_the_run_continues(monkeypatch):
    """After a CUDA fault every CUDA call raises. The run must list failures and end normally."""

    def fault(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(bench_model, "clear", fault)
    where = torch.device("cpu"), torch.float32, None, 1, [EAGER, OURS], None
    found = list(bench_model.run(find("tiny"), [Case("tg", 1)], *where))
    assert len(found) == 2 and all(r.status.startswith("failed: CUDA error") for r in found)
    monkeypatch.setattr(machine, "measure_roof", fault)
    machine.measure_again(head := {}, torch.device("cpu"), torch.float32)
    assert not head


def test_commit_of_another_repository_is_not_reported(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "machine.py").touch()
    assert machine._commit(tmp_path / "machine.py") is None


def test_step_seconds_returns_a_time_for_each_step():
    times = bench_model.step_seconds(lambda: torch.zeros(1), 5, cuda=False)
    assert len(times) == 5 and min(times) > 0
