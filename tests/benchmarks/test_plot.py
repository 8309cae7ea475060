"""Tests the command `python -m benchmarks.plot`, which reads results.json and writes results.md and
the plots. Also tests the labels in the README's picture."""

import json
from pathlib import Path
from shutil import copy

import pytest
from click.testing import CliRunner

from gemma_fast.benchmarks import plot
from gemma_fast.benchmarks.kernels.suite import KernelResult
from gemma_fast.benchmarks.measure.machine import Roof, Work
from gemma_fast.benchmarks.measure.outcome import OURS
from gemma_fast.benchmarks.measure.plots import model_plots
from gemma_fast.benchmarks.measure.report import kernel_report
from gemma_fast.benchmarks.measure.timing import Times

RESULTS = Path(__file__).parents[2] / "benchmarks/results/cpu-amd-epyc/results.json"
FOUND = json.loads(RESULTS.read_text())
ROOF = Roof(**FOUND["roof"])


def test_results_are_read_back_as_they_were_written():
    for row in FOUND["results"]:
        result = plot.model_result(row)
        figures = result.figures(ROOF)
        assert result.case.name == row["test"]
        assert figures["tokens_per_s"] == pytest.approx(row["tokens_per_s"])
        for share in {"mfu", "mbu"} & row.keys():
            assert figures[share] == pytest.approx(row[share])


def test_bars_are_labelled_with_speed_and_share_of_the_roof():
    name, figure = next(model_plots(ROOF, [*map(plot.model_result, FOUND["results"])]))
    assert name == "speed" and len(figure.axes) == 2
    # six bars per panel, each in front of a pale bar that shows the roof
    assert [len(panel.patches) for panel in figure.axes] == [2 * 6, 2 * 6]
    prompts, steps = ([text.get_text() for text in panel.texts] for panel in figure.axes)
    assert "1094 tokens/s, 57% of the roof" in prompts
    assert "24.2 tokens/s, 39% of the roof" in steps
    assert figure.get_facecolor() == (1, 1, 1, 1)


def test_command_draws_the_results_of_a_model(tmp_path):
    copy(RESULTS, tmp_path)
    done = CliRunner().invoke(plot.main, [str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert {x.name for x in tmp_path.glob("*.png")} == {"speed.png", "depth.png"}
    written = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert written == RESULTS.with_suffix(".md").read_text(encoding="utf-8")
    lines = [line for line in written.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(FOUND["results"])
    assert not [line for line in lines if "|  |" in line] and "memory |" not in lines[0]


def test_command_draws_the_results_of_kernels(tmp_path):
    work, times = Work(6e7, 1e9), Times(4e-5, 3.6e-5, 4.4e-5)
    results = [
        KernelResult("rms_norm", "8192 x 2048", OURS, "ok", work, times=times, graph=True),
        KernelResult("rms_norm", "8192 x 2048", "liger", "not installed: x", work),
    ]
    kernel_report(FOUND["stamp"], ROOF, results, plot.ABOUT).write(tmp_path)
    expected = (tmp_path / "results.md").read_text(encoding="utf-8")
    (tmp_path / "results.md").unlink()
    done = CliRunner().invoke(plot.main, [str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "roofline.png").exists()
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == expected


@pytest.mark.parametrize(
    "content", ["{}", '{"results": []}', "no JSON"], ids=["empty", "no results", "not JSON"]
)
def test_file_without_benchmark_results_is_refused(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    done = CliRunner().invoke(plot.main, [str(tmp_path)])
    assert done.exit_code == 1
    assert "results.json does not contain results of the benchmarks" in done.output
