"""Tests the report on a model: files, tables, plots, and ratios to rivals."""

import json
from dataclasses import replace

import pytest

from gemma_fast.benchmarks.measure.machine import Roof
from gemma_fast.benchmarks.measure.model_report import model_report, readme_table
from gemma_fast.benchmarks.measure.outcome import (
    EAGER,
    LLAMA_CPP,
    OURS,
    TRANSFORMERS,
    UNPACKED,
    WITHOUT_GRAPHS,
)
from gemma_fast.benchmarks.measure.plots import model_plots, write_plots
from gemma_fast.benchmarks.model.cases import Case
from gemma_fast.benchmarks.model.providers import STATIC
from gemma_fast.benchmarks.model.result import ModelResult
from gemma_fast.presets import PRESETS

ROOF = Roof(copy=2e12, product=1e15)
GEMMA = PRESETS["gemma-2b"]
TIMED = {"samples_s", "token_samples_s", "tokens_per_s", "tokens_per_s_sd"}


def result(case, provider, seconds=(), status="ok", token_seconds=(), dtype="bfloat16"):
    work = case.work(GEMMA, 2)
    return ModelResult(
        case, provider, dtype, status, work, 0.03, seconds, token_seconds, size_bytes=5.01e9
    )


STAMP = {
    "gpu": "GPU", "cpu": None, "driver": "580", "cuda": "13.0", "cudnn": 9, "torch": "2.13",
    "triton": "3.7", "python": "3.12", "rivals": {"transformers": "5.23"}, "dtype": "bfloat16",
    "commit": "abc", "date": "2026-11-21",
}  # fmt: skip
ABOUT = {
    "model": "gemma-2b", "params": GEMMA.num_parameters, "active_params": GEMMA.num_parameters,
    "checked": "Checked against the reference in float32.",
}  # fmt: skip


def test_report_on_a_mixture_of_experts_tells_the_active_parameters():
    """Reports of other models do not mention them."""
    results = [result(Case("tg", 128), OURS, (0.32, 0.32), token_seconds=(0.0025,) * 128)]
    mixture = ABOUT | {"active_params": 1_500_000_000}
    text = model_report(STAMP, ROOF, results, mixture).markdown
    assert "gemma-2b, 2.51 B parameters, 1.50 B active:" in text and "a mixture of experts" in text
    text = model_report(STAMP, ROOF, results, ABOUT).markdown
    assert "gemma-2b, 2.51 B parameters:" in text and "experts" not in text


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
    assert (
        "| pp512 | gemma_fast | bfloat16 | 51200.00 ± 0.00 | 2.00 | 10 ms | – | 5.01 GB | 9.81 MB "
        "| – | 20.5% MFU |"
    ) in text
    assert (
        "| tg128 | gemma_fast | bfloat16 | 400.00 ± 0.00 | 4.00 | – | 2.5 ms / 2.5 ms | 5.01 GB "
        "| 5.01 GB | 5.30 GB | 100.3% MBU |"
    ) in text
    absent = "| tg128 | transformers (sdpa) | bfloat16 | not installed: No module named 'x' |"
    assert absent in text and "gemma-2b, 2.51 B parameters" in text
    assert text.endswith("\\* Inductor skipped CUDA graphs.\n")
    assert "copy 2000 GB/s" in text and "commit abc" in text and "batch |" not in text
    order = [x.split(" | ")[:2] for x in text.splitlines() if x.startswith(("| pp", "| tg"))]
    assert order == [
        ["| pp512", EAGER], ["| pp512", OURS],
        ["| tg128", EAGER], ["| tg128", "transformers (sdpa)"], ["| tg128", OURS],
        ["| tg128 @ d4096", OURS], ["| tg128 @ d4096", f"{STATIC} \\*"],
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


def side_by_side():
    """Results as in the README: 2 s of the rival in float32, 1 s in bfloat16, 0.5 s of llama.cpp;
    half of the time for each of ours."""
    read, write = Case("pp", 512), Case("tg", 32, depth=512)
    seconds = {
        (TRANSFORMERS, "float32"): 2.0, (TRANSFORMERS, "bfloat16"): 1.0,
        (OURS, "bfloat16"): 0.25, (UNPACKED, "float32"): 1.0, (UNPACKED, "bfloat16"): 0.5,
        (LLAMA_CPP, None): 0.5,
    }  # fmt: skip
    return [
        result(case, name, (x / part,), token_seconds=(0.1,), dtype=dtype)
        for part, case in ((1, read), (4, write))
        for (name, dtype), x in seconds.items()
        if (case, name) != (write, LLAMA_CPP)
    ]


def test_each_result_has_its_speed_relative_to_each_rival():
    rows = json.loads(model_report(STAMP, ROOF, side_by_side(), ABOUT).json)["results"]
    found = {
        (x["kind"], x["provider"], x["dtype"]): {
            key.removeprefix("x_"): value for key, value in x.items() if key.startswith("x_")
        }
        for x in rows
    }
    same, wide = "transformers", "transformers_float32"
    assert found["pp", OURS, "bfloat16"] == {same: 4, wide: 8, "llama_cpp": 2}
    assert found["tg", OURS, "bfloat16"] == {same: 4, wide: 8}
    assert found["pp", UNPACKED, "float32"] == {same: 2, "llama_cpp": 0.5}
    assert found["pp", UNPACKED, "bfloat16"] == {same: 2, wide: 4, "llama_cpp": 1}
    assert found["pp", LLAMA_CPP, None] == {wide: 4, "llama_cpp": 1}


def test_table_of_the_readme_has_a_line_for_each_provider_and_the_stamp():
    load = {"others": 0.02, "cores": 2, "average_before": 0.1, "average_after": 2.0}
    found = json.loads(model_report(STAMP | {"load": load}, ROOF, side_by_side(), ABOUT).json)
    head, _, *lines, empty, stamp, more = readme_table(found).split("\n")[:11]
    assert head == (
        "| tokens per second | pp512 | tg32 @ d512 | × transformers | × transformers, float32 "
        "| × llama.cpp |"
    )
    assert lines[0] == "| transformers (sdpa), float32 | 256 | 64.0 | 1.00 / 1.00 | – | 0.25 / – |"
    packed = "| gemma_fast, bfloat16 | 2048 | 512 | 4.00 / 4.00 | 8.00 / 8.00 | 2.00 / – |"
    assert lines[2] == packed and len(lines) == 6 and not empty
    told = f"{stamp} {more}"
    assert "GPU · 2026-11-21, commit abc. Ratios: pp512 / tg32 @ d512." in told
    assert "Other processes used 0.02 of 2 cores during this run (load average 0.1 before" in told
    assert max(map(len, (head, *lines, stamp, more))) <= 120


def test_busy_machine_is_stated_in_the_report():
    load = {"others": 0.3, "cores": 2, "average_before": 0.1, "average_after": 2.0}
    results = side_by_side()
    busy = model_report(STAMP | {"load": load}, ROOF, results, ABOUT).markdown
    assert "used 0.3 of 2 cores during this run: its figures are not to be compared (" in busy
    quiet = model_report(STAMP | {"load": load | {"others": 0.1}}, ROOF, results, ABOUT).markdown
    assert "used 0.1 of 2 cores during this run (load" in quiet
    unknown = model_report(STAMP | {"load": None}, ROOF, results, ABOUT).markdown
    assert "The load by other processes is unknown." in unknown
