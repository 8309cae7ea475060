"""Tests `python -m benchmarks.gpu`, which runs tests and benchmarks as stages.

A stage is a process with a time limit. A stage that fails must not stop the stages after it.
"""

import json
import os
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from gemma_fast.benchmarks import gpu
from gemma_fast.benchmarks.__main__ import main
from gemma_fast.benchmarks.gpu import SIZES, Stage, run_stages, stages
from gemma_fast.benchmarks.kernels.table import SUITES
from gemma_fast.benchmarks.measure.outcome import GENERATE_BATCH, OURS
from gemma_fast.benchmarks.measure.report import NOTHING
from gemma_fast.benchmarks.model.cases import cases
from gemma_fast.benchmarks.model.command import chosen_cases
from gemma_fast.benchmarks.model.providers import providers_of
from gemma_fast.benchmarks.options import pick_sizes
from gemma_fast.presets import PRESETS

HEAD = {
    "gpu": "GPU", "cpu": None, "driver": "580", "cuda": "13.0", "cudnn": 9, "torch": "2.13",
    "triton": "3.7", "python": "3.12", "rivals": {}, "dtype": "bfloat16", "commit": "abc",
    "date": "2026-11-28",
}  # fmt: skip


def python(name: str, code: str, share: float = 1) -> Stage:
    return Stage(name, share, ["-c", code])


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Shortens GRACE, the time between SIGINT and SIGKILL for a stage."""
    monkeypatch.setattr(gpu, "GRACE", 0.2)


def test_stage_limits_add_up_to_the_total_time(monkeypatch, tmp_path):
    """If a stage ends early, later stages get the rest of its time."""
    now = [0.0]
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: now[0])

    def run(takes, limit, *_):
        now[0] += limit * takes
        return gpu.Done("a stage", "ok", limit * takes, limit)

    monkeypatch.setattr(gpu, "run_stage", lambda stage, *given: run(1, *given))
    done = run_stages(stages(cuda=True), 480, tmp_path, HEAD, True)
    assert sum(x.limit_s for x in done) == pytest.approx(480) and len(done) == 10
    assert [round(x.limit_s) for x in done] == [round(x.share) for x in stages(cuda=True)]
    monkeypatch.setattr(gpu, "run_stage", lambda stage, *given: run(0, *given))
    done = run_stages(stages(cuda=True), 480, tmp_path, HEAD, True)
    assert done[-1].limit_s == pytest.approx(480)


def test_a_stage_that_fails_or_hangs_does_not_stop_the_others(tmp_path, capsys):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', {!r}])"
    hangs = "import time; print('before', flush=True); time.sleep(60)"
    todo = [
        python("fails", "print('half'); raise SystemExit(3)"),
        python("hangs", hangs),
        python("its child hangs", child.format(hangs)),
        Stage("cannot", 1, [], "pytest is not installed"),
        python("works", "print('all well')", share=10),
    ]
    done = run_stages(todo, 14, tmp_path, HEAD, True)
    assert [(x.stage, x.status, x.exit_code, x.found) for x in done] == [
        ("fails", "failed", 3, "half"),
        ("hangs", "out of time", done[1].exit_code, "before"),
        ("its child hangs", "out of time", done[2].exit_code, "before"),
        ("cannot", "left out: pytest is not installed", None, ""),
        ("works", "ok", 0, "all well"),
    ]
    assert (tmp_path / "its-child-hangs/log.txt").read_text().startswith("before\n")
    assert "all well" in capsys.readouterr().out, "output must be shown while the stage runs"
    saved = json.loads((tmp_path / "summary.json").read_text())
    assert saved["stamp"] == HEAD and saved["measured"]
    assert [x["stage"] for x in saved["stages"]] == [stage.name for stage in todo]
    assert saved["stages"][0].keys() == {
        "stage", "status", "seconds", "limit_s", "exit_code", "found",
    }  # fmt: skip
    assert "| fails | failed |" in (tmp_path / "summary.md").read_text()


def test_every_benchmark_stage_gets_an_output_folder():
    told = [x.name for x in stages(cuda=True) if x.arguments[0].startswith(gpu.BENCHMARKS)]
    assert told == [
        "decode",
        "decode int8",
        "decode int4",
        "prefill",
        "arrival",
        "gemma 4",
        "kernels",
        "profile",
    ]


def test_every_file_with_a_test_marked_gpu_is_in_the_first_stage():
    mark = "mark." + "gpu"  # in two parts, so that this file is not found
    files = [x for x in (gpu.ROOT / "tests").rglob("test_*.py") if mark in x.read_text()]
    assert len(files) >= 5
    assert {*map(str, files)} <= {*stages(cuda=True)[0].arguments}


def test_important_kernel_suites_run_first_and_all_run():
    (words,) = [x.arguments for x in stages(cuda=True) if x.name == "kernels"]
    assert words[1 : 1 + len(gpu.IMPORTANT)] == list(gpu.IMPORTANT)
    assert {*words[1 : 1 + len(SUITES)]} == {*SUITES}


def test_every_kernel_suite_runs_with_one_to_three_sizes():
    found = {name: pick_sizes(suite.sizes, SIZES) for name, suite in SUITES.items()}
    others = {name: sizes for name, sizes in found.items() if len(sizes) != 2}
    assert others.pop("add_rms_norm_post") == ["8192 x 2304"]
    assert others.keys() == {"attention", "decode_attention"}
    assert all(sizes[-1].endswith("d 512") for sizes in others.values()), "Gemma 4's full layers"


def test_a_stage_measures_prompts_and_tokens_of_a_gemma_4():
    (words,) = [x.arguments for x in stages(cuda=True) if x.name == "gemma 4"]
    chosen = main.make_context("benchmarks", list(words[1:])).params
    assert PRESETS[chosen["model"]].model_type == "gemma4"
    tests = cases(*(chosen[x] for x in ("prompts", "new", "depths", "batches")))
    assert [x.name for x in tests] == ["pp2048", "tg64", "pp2048 @ d4096", "tg64 @ d4096"]


def test_a_stage_measures_arrivals_for_three_batch_sizes():
    (words,) = [x.arguments for x in stages(cuda=True) if x.name == "arrival"]
    chosen = main.make_context("benchmarks", list(words[1:])).params
    names = "prompts", "new", "depths", "batches", "arrival"
    tests = chosen_cases(**{name: chosen[name] for name in names})
    assert {x.name for x in tests} == {"128 x pp512+tg32"}
    assert [x.batch for x in tests] == [8, 32, 64]
    assert chosen["only"] == (OURS, GENERATE_BATCH) and {*chosen["only"]} <= {*providers_of(True)}


def test_test_files_that_import_missing_packages_are_left_out(monkeypatch):
    before = gpu.runnable("hf/test_*.py")
    find = gpu.find_spec
    monkeypatch.setattr(
        gpu, "find_spec", lambda name: None if name == "transformers" else find(name)
    )
    assert len(before) > len(gpu.runnable("hf/test_*.py"))
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    assert gpu.tests("tests", 1, [], "gpu").missing == "pytest is not installed"


def test_stopping_the_command_ends_its_running_stage(tmp_path):
    """SIGTERM to the command must also end the stage's process, so that the GPU is free again."""
    code = """
import sys
from pathlib import Path
from gemma_fast.benchmarks import gpu
from gemma_fast.benchmarks.__main__ import main
hangs = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
gpu.stages = lambda cuda: [gpu.Stage("hangs", 1, ["-c", hangs])]
gpu.main(["--out", sys.argv[1]])
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, end = tmp_path / "hangs/log.txt", time.monotonic() + 60
    while not (log.exists() and log.read_text()) and time.monotonic() < end:
        time.sleep(0.1)
    process.terminate()
    process.wait(30)
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


def test_summary_of_packed_weights_states_the_speed_beside_bfloat16(tmp_path):
    folder = tmp_path / "decode-int4"
    folder.mkdir()
    rates = {gpu.OURS: 270.0, gpu.UNPACKED: 100.0, "eager": None}
    rows = [
        {"provider": name, "status": "ok"} | ({"tokens_per_s": rate} if rate else {})
        for name, rate in rates.items()
    ]
    (folder / "results.json").write_text(json.dumps({"results": rows}))
    assert gpu.summary(folder) == "3 results, 3 ok, 2.70 × bfloat16 (target 2.6)"


@pytest.mark.slow
def test_without_a_gpu_stages_run_and_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = CliRunner().invoke(gpu.main, ["--out", str(tmp_path), "--minutes", "20"])
    assert done.exit_code == 0, done.output
    assert NOTHING in done.output and "left out: needs a GPU" in done.output
    saved = json.loads((tmp_path / "summary.json").read_text())
    assert not saved["measured"]
    left_out = {"gemma 4", "profile"}
    assert {x["stage"] for x in saved["stages"] if x["status"] != "ok"} == left_out
    for name in ("decode", "decode-int8", "prefill", "arrival", "kernels"):
        assert json.loads((tmp_path / name / "results.json").read_text())["stamp"]
