"""Tests the model benchmark: its formulas for rates, its errors, and that repeats take turns.
Also runs every provider (implementation of the model) on a CPU."""

import json
import subprocess
from dataclasses import replace
from functools import partial

import pytest
import torch
from click.testing import CliRunner

from gemma_fast.benchmarks.measure import machine, timing
from gemma_fast.benchmarks.measure.machine import Roof
from gemma_fast.benchmarks.measure.outcome import EAGER, LLAMA_CPP, OURS
from gemma_fast.benchmarks.model import attempt, eager, race
from gemma_fast.benchmarks.model.cases import Case, find
from gemma_fast.benchmarks.model.judge import Judge
from gemma_fast.benchmarks.model.providers import BESIDE_PACKED, PROVIDERS, RINGS, STATIC
from gemma_fast.benchmarks.model.result import ModelResult, percentile
from gemma_fast.benchmarks.options import bench
from gemma_fast.cli import commands
from gemma_fast.presets import PRESETS

ROOF = Roof(copy=2e12, product=1e15)
GEMMA = PRESETS["gemma-2b"]
TIMED = {"samples_s", "token_samples_s", "tokens_per_s", "tokens_per_s_sd"}


def result(case, provider, seconds=(), status="ok", token_seconds=()):
    work = case.work(GEMMA, 2)
    return ModelResult(case, provider, "bfloat16", status, work, 0.03, seconds, token_seconds)


def test_throughput_latency_and_mfu_follow_from_the_times():
    case = Case("tg", 100, depth=512, batch=2)
    steps = (0.002,) * 98 + (0.003, 0.004)
    x = result(case, OURS, (0.2, 0.25), token_seconds=steps).figures(ROOF)
    assert x["tokens_per_s"] == pytest.approx(200 / 0.225)  # 0.225 s is the median time
    assert x["tokens_per_s_sd"] == pytest.approx(100 * 2**0.5)
    stalled = result(case, OURS, (0.2, 0.25, 9.0), token_seconds=steps).figures(ROOF)
    assert stalled["tokens_per_s"] == pytest.approx(200 / 0.25)
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


def test_share_of_the_matmul_is_of_the_result_s_dtype():
    several = Roof(2e12, 1e15, {"float32": 1e15, "bfloat16": 4e15})
    half = result(Case("pp", 512), OURS, (0.01,))
    shares = [
        x.figures(several)["mfu"]
        for x in (half, replace(half, dtype="float32"), replace(half, dtype=None))
    ]
    assert shares[1] == 4 * shares[0] and shares[2] == shares[0]  # no dtype: the fastest matmul


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
    done = CliRunner().invoke(commands.main, arguments)
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
    assert "| pp4 | eager | float32 | ok, not measured |" in done.stdout
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
        long = "cannot: 16392 tokens exceed the context of 16384"
        assert f"| pp16384 @ d8 | {name} | float32 | {long} |" in done.stdout
        assert f"| pp8 @ d8 | {name} | float32 | ok, not measured |" in done.stdout


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


class Recording:
    """A provider that records the names of the methods that are called."""

    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def __getattr__(self, method):
        def call(*_, **__):
            self.calls.append((self.name, method))
            if self.calls.count(("breaks", "step")) == 7 and self.name == "breaks":
                raise RuntimeError("breaks later")  # in the first step of the third repeat
            return {} if method in ("memory", "sizes") else None

        return call


def recorded(monkeypatch, device, free=1e12):
    """Runs three providers three times in one case. Returns calls after the checks, and results."""
    calls = []
    for name in ("one", "two", "breaks"):
        made = Recording(name, calls)
        monkeypatch.setitem(PROVIDERS, name, lambda *_, made=made: made)
    monkeypatch.setattr(race, "free_bytes", lambda _: free)
    monkeypatch.setattr(Judge, "check", lambda *_: calls.append(("", "check")) or 0.0)
    monkeypatch.setattr(timing, "ENOUGH", 0)
    checkpoint, dtypes = find("tiny"), [torch.float32]
    groups = race.groups(checkpoint.config, ["one", "two", "breaks"], dtypes, device)
    judge = Judge(checkpoint, torch.float32, torch.device("cpu"))
    cpu = torch.device("cpu")
    found = list(race.run(checkpoint, [Case("tg", 2, depth=3)], cpu, groups, ROOF, 3, judge))
    return groups, calls, found


def test_repeats_of_the_providers_take_turns_after_all_were_checked(monkeypatch):
    groups, calls, found = recorded(monkeypatch, torch.device("cpu"))
    assert [name for name, _ in groups[0]] == ["one", "two", "breaks"] and len(groups) == 1
    last_check = max(i for i, call in enumerate(calls) if call[1] == "check")
    assert [x for x in calls[:last_check] if x[1] in ("prefill", "step")] == []
    turns = [name for name, method in calls if method == "prefill"]
    assert turns == ["one", "two", "breaks"] * 4 + ["one", "two"]  # warm-up, 3 repeats, tokens
    steps = [name for name, method in calls if method == "step"]
    assert steps[:6] == ["one"] * 2 + ["two"] * 2 + ["breaks"] * 2
    assert [x.status for x in found] == ["ok", "ok", "failed: breaks later"]
    assert [len(x.seconds) for x in found] == [3, 3, 0]


@pytest.mark.parametrize(("device", "free"), [("cuda", 1e12), ("cpu", 1e5)])
def test_one_provider_at_a_time_on_a_gpu_or_in_little_memory(device, free, monkeypatch):
    groups, calls, _ = recorded(monkeypatch, torch.device(device), free)
    assert [len(group) for group in groups] == [1, 1, 1]
    turns = [name for name, method in calls if method == "prefill"]
    assert turns == ["one"] * 5 + ["two"] * 5 + ["breaks"] * 4


def test_cases_with_the_same_check_are_checked_once(monkeypatch):
    checked = []
    monkeypatch.setattr(Judge, "check", lambda *given: checked.append(given[3].name) or 0.5)
    checkpoint, kind, cpu = find("tiny"), torch.float32, torch.device("cpu")
    tests = [Case("pp", 9), Case("tg", 2, depth=9), Case("tg", 2, depth=9, batch=2), Case("tg", 2)]
    judge = Judge(checkpoint, kind, cpu)
    found = list(race.run(checkpoint, tests, cpu, [[(OURS, kind)]], None, 1, judge))
    assert checked == ["pp9", "tg2 @ d9", "tg2"] and {x.error for x in found} == {0.5}


def test_llama_cpp_runs_once_beside_several_dtypes():
    dtypes = [torch.float32, torch.bfloat16]
    (group,) = race.groups(find("tiny").config, [LLAMA_CPP, OURS], dtypes, torch.device("cpu"))
    assert group == [(OURS, dtypes[0]), (OURS, dtypes[1]), (LLAMA_CPP, torch.bfloat16)]


@pytest.mark.usefixtures("roof")
def test_several_dtypes_stand_side_by_side(monkeypatch):
    monkeypatch.setattr(timing, "ENOUGH", 0)
    names = ["--only", "transformers (sdpa)", "--only", OURS]
    options = ["-p", "8", "-n", "2@5", "-r", "1", "-o", "json", "--dtype", "float32,bfloat16"]
    done = CliRunner().invoke(bench, ["--model", "tiny", *options, *names])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    rows = {(x["test"], x["provider"], x["dtype"]): x for x in found["results"]}
    assert len(rows) == 8 and {x["status"] for x in rows.values()} == {"ok"}
    assert found["stamp"]["dtype"] == "float32, bfloat16"
    assert found["checked"].endswith("Order: repeats of all providers take turns.")
    wide, half = (rows["tg2 @ d5", OURS, x] for x in ("float32", "bfloat16"))
    rival = rows["tg2 @ d5", "transformers (sdpa)", "float32"]
    assert half["error"] > 100 * wide["error"]
    for row in (wide, half):
        key = "x_transformers" if row is wide else "x_transformers_float32"
        assert row[key] == pytest.approx(row["tokens_per_s"] / rival["tokens_per_s"])


def test_cuda_fault_is_listed_and_the_run_continues(monkeypatch):
    """After a CUDA fault every CUDA call raises. The run must list failures and end normally."""

    def fault(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(attempt, "clear", fault)
    groups = [[(EAGER, torch.float32)], [(OURS, torch.float32)]]
    where = torch.device("cpu"), groups, None, 1, None
    found = list(race.run(find("tiny"), [Case("tg", 1)], *where))
    assert len(found) == 2 and all(r.status.startswith("failed: CUDA error") for r in found)
    monkeypatch.setattr(machine, "measure_roof", fault)
    machine.measure_again(head := {}, torch.device("cpu"), torch.float32)
    assert not head


def test_commit_of_another_repository_is_not_reported(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "machine.py").touch()
    assert machine._commit(tmp_path / "machine.py") is None


def test_step_seconds_returns_a_time_for_each_step():
    times = attempt.step_seconds(lambda: torch.zeros(1), 5, cuda=False)
    assert len(times) == 5 and min(times) > 0
