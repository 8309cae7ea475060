"""Tests the command `python -m benchmarks`, which benchmarks kernels and whole models."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from example_suite import PROVIDERS, SUITE

from gemma_fast.benchmarks.__main__ import main
from gemma_fast.benchmarks.kernels.table import SUITES
from gemma_fast.benchmarks.measure import report
from gemma_fast.benchmarks.measure.outcome import EAGER, OURS
from gemma_fast.benchmarks.model.cases import find
from gemma_fast.benchmarks.model.providers import PROVIDERS as MODEL_PROVIDERS


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_command_without_a_gpu_measures_nothing(tmp_path):
    done = CliRunner().invoke(main, ["rms_norm", "attention", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert report.NOTHING in done.output and "No plots" in done.output
    assert sorted(x.name for x in tmp_path.iterdir()) == ["results.json", "results.md"]
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["roof"] is None
    ours = [x for x in saved["results"] if x["provider"] == OURS]
    assert ours and all(x["status"] == "ok, not measured" for x in ours)
    assert all(x.keys() == {"suite", "size", "provider", "status", "error", "took_s"} for x in ours)
    assert report.NOTHING in (tmp_path / "results.md").read_text()


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("names", "code"),
    [([EAGER, OURS, "absent", "unable", "broken"], 0), ([OURS, "off"], 1), ([OURS, "NaN"], 1)],
    ids=["other providers fail", "a provider is wrong", "a provider returns NaN"],
)
def test_exit_status_is_1_if_a_result_is_wrong_or_gemma_fast_failed(names, code, monkeypatch):
    providers = {name: PROVIDERS[name] for name in names}
    monkeypatch.setitem(SUITES, "double", replace(SUITE, providers=providers))
    assert CliRunner().invoke(main, ["double"]).exit_code == code
    monkeypatch.setitem(SUITES, "double", replace(SUITE, providers={OURS: PROVIDERS["broken"]}))
    assert CliRunner().invoke(main, ["double"]).exit_code == 1


@pytest.mark.usefixtures("no_gpu")
def test_only_option_runs_only_the_named_provider():
    done = CliRunner().invoke(main, ["geglu", "--only", OURS])
    assert done.exit_code == 0
    assert OURS in done.output and EAGER not in done.output.split("× eager")[1]


@pytest.mark.usefixtures("no_gpu")
def test_size_option_selects_sizes_by_part_of_their_name():
    done = CliRunner().invoke(main, ["lm_head", "--only", OURS, "--size", "b 3"])
    assert done.exit_code == 0
    assert "199 x 64, b 3" in done.stdout and "199 x 64, b 1" not in done.stdout
    done = CliRunner().invoke(main, ["lm_head", "geglu", "--size", "b 4"])
    assert done.exit_code == 2 and "no size has b 4 in its name" in done.output
    # `rms_norm` does not have this provider, so it prints no table. The suite `model` runs.
    names = ["rms_norm", "model", "--only", "transformers (eager)", "--size", "5 x 48"]
    done = CliRunner().invoke(main, [*names, "-p", "4", "-n", "0"])
    assert done.exit_code == 0, done.output
    assert "pp4" in done.stdout and "rms_norm" not in done.stdout


@pytest.mark.usefixtures("no_gpu")
def test_results_are_written_after_each_size(monkeypatch, tmp_path):
    """An interrupted run keeps the results of all sizes that it finished."""
    providers = {OURS: lambda *inputs: stop()}

    def stop():
        saved = json.loads((tmp_path / "results.json").read_text())
        raise KeyboardInterrupt(str(len(saved["results"])))

    stopped = replace(SUITES["rms_norm"], providers=providers, yardstick=False)
    monkeypatch.setitem(SUITES, "rms_norm", stopped)
    done = CliRunner().invoke(main, ["geglu", "rms_norm", "--only", OURS, "--out", str(tmp_path)])
    saved = json.loads((tmp_path / "results.json").read_text())
    assert done.exit_code == 1 and [x["suite"] for x in saved["results"]] == ["geglu"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["rmsnorm"], "no suite rmsnorm: choose from attention, decode_attention"),
        (["geglu", "--model", "demo"], "--model is for the suite model"),
        (["geglu", "-d", "5"], "-d is for the suite model"),
        (["--only", "liger", "-p", "5"], "-p is for the suite model"),
        (["model", "--size", "b 1"], "--size is not for the suite model: use -p, -n, -d"),
        (["lm_head", "--size", "b 3", "--size", "b 99"], "no size has b 99 in its name"),
        (["-o", "json"], "-o json is for the suite model alone"),
        (["geglu", "--dtype", "float32,bfloat16"], "several --dtype are for the suite model alone"),
        (["model", "--dtype", "float32,int8"], "'int8' is not one of bfloat16, float16, float32"),
        (["model", "-n", "32@512@1"], "'32@512@1' is not a whole number"),
        (["model", "-d", "8@5"], "'8@5' is not a whole number"),
        (["model", "-b", "0"], "0 is less than 1"),
        (["geglu", "--only", "vllm"], "no provider vllm: choose from eager, torch.compile"),
        (["geglu", "--out", "/dev/null/x"], "--out /dev/null/x"),
        (["model", "--model", "no/such/model"], "no/such/model"),
    ],
    ids=str,
)
def test_errors_name_the_wrong_argument(arguments, complaint):
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code in (1, 2) and isinstance(done.exception, SystemExit)
    assert complaint in done.output


@pytest.mark.parametrize("arguments", [["--help"], ["-p", "x"]], ids=str)
def test_help_and_usage_errors_of_bench_do_not_import_torch(arguments):
    code = f"""if True:
        import atexit, sys
        from gemma_fast.cli.commands import main
        atexit.register(lambda: print('torch' in sys.modules))
        main(['bench', *{arguments}])
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("False\n"), done.stdout + done.stderr


def test_list_option_shows_suites_and_providers():
    done = CliRunner().invoke(main, ["--list"])
    assert done.exit_code == 0
    assert all(name in done.output for name in (*SUITES, *MODEL_PROVIDERS))
    done = CliRunner().invoke(main, ["rms_norm", "--list"])
    assert "attention" not in done.output and OURS in done.output


def test_unknown_name_lists_the_sizes():
    with pytest.raises(FileNotFoundError, match=r"gemma-4 is not a .*: tiny, .*gemma-4-e2b"):
        find("gemma-4")


@pytest.mark.parametrize("name", ["gemma-2-2b", "tiny", "demo"])
def test_name_that_is_a_folder_too_is_refused(name, tmp_path, monkeypatch):
    """Otherwise random weights would be measured instead of the folder's."""
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"there is also a path {name}: write ./{name} for the"):
        find(name)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        find(f"./{name}")
