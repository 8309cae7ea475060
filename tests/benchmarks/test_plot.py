"""Tests the command `python -m benchmarks.plot`, which reads results.json and writes results.md and
the plots and prints the README's table. Also tests the README's table and its picture's labels."""

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

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/cpu-amd-epyc/results.json"
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
    for panel, kind, share in zip(figure.axes, ("pp", "tg"), ("mfu", "mbu"), strict=True):
        rows = [x for x in FOUND["results"] if x["kind"] == kind]
        assert len(panel.patches) == 2 * len(rows)  # each before a pale bar that shows the roof
        texts = [text.get_text() for text in panel.texts]
        for row in rows:
            rate = row["tokens_per_s"]
            rate = f"{rate:.3g}" if rate < 100 else f"{rate:.0f}"
            assert f"{rate} tokens/s, {row[share]:.0%} of the roof" in texts
        names = {text.get_text() for text in panel.get_yticklabels()}
        assert names == {f"{x['provider']}, {x['dtype']}".removesuffix(", None") for x in rows}
    assert figure.get_facecolor() == (1, 1, 1, 1)


def test_command_draws_the_results_of_a_model(tmp_path):
    copy(RESULTS, tmp_path)
    done = CliRunner().invoke(plot.main, [str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "speed.png" in {x.name for x in tmp_path.glob("*.png")}
    written = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert written == RESULTS.with_suffix(".md").read_text(encoding="utf-8")
    lines = [line for line in written.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(FOUND["results"])
    assert not [line for line in lines if "|  |" in line] and "memory |" not in lines[0]


def test_readme_shows_the_table_that_the_command_prints(tmp_path):
    copy(RESULTS, tmp_path)
    printed = CliRunner().invoke(plot.main, [str(tmp_path)]).stdout
    assert len(printed.splitlines()) > 4 and FOUND["stamp"]["commit"] in printed
    assert f"\n\n{printed}\n" in (ROOT / "README.md").read_text(encoding="utf-8")


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
