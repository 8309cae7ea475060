"""Tests `gemma-fast bench --arrival`: many prompts, and fewer texts at the same time."""

import json
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from gemma_fast.benchmarks import plot
from gemma_fast.benchmarks.__main__ import main
from gemma_fast.benchmarks.measure import machine, timing
from gemma_fast.benchmarks.measure.machine import Roof
from gemma_fast.benchmarks.measure.model_report import add_ratios
from gemma_fast.benchmarks.measure.outcome import GENERATE_BATCH, ONE_BY_ONE, OURS, Wrong, serious
from gemma_fast.benchmarks.model.arrival import Arrival, arrivals, check_texts
from gemma_fast.benchmarks.model.cases import find
from gemma_fast.benchmarks.model.generate_batch import GenerateBatch
from gemma_fast.benchmarks.model.judge import Judge
from gemma_fast.benchmarks.model.providers import ARRIVAL_PROVIDERS, Many
from gemma_fast.benchmarks.model.race import groups, run
from gemma_fast.benchmarks.model.result import ModelResult
from gemma_fast.benchmarks.options import bench
from gemma_fast.reference import Reference

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
ROOF = Roof(copy=2e12, product=1e15)
CASE = Arrival(prompts=5, longest=20, tokens=6, batch=2)


@pytest.fixture(scope="module")
def judge():
    return Judge(find("tiny"), FP32, CPU)


@pytest.fixture
def roof(monkeypatch):
    """Hides the GPU, and replaces the measurement of the peak rates (the roof)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "measure_roof", lambda *_: ROOF)
    monkeypatch.setattr(timing, "ENOUGH", 0)


def greedy(ids, new):
    """Returns the reference's continuation of a prompt, and the distance in standard deviations
    between the two largest logits of each token."""
    reference = Reference.from_checkpoint(find("tiny"), dtype=FP32, device=CPU)
    text, gaps = [], []
    for _ in range(new):
        logits = reference(torch.tensor([ids + text]), logits_to_keep=1).logits[0, -1]
        best = logits.topk(2)
        text.append(int(best.indices[0]))
        gaps.append(float((best.values[0] - best.values[1]) / logits.std()))
    return text, gaps


def test_prompts_have_all_lengths_in_mixed_order():
    ids = Arrival(prompts=32, longest=512, tokens=8, batch=4).ids(199)
    sizes = [*map(len, ids)]
    assert sorted(sizes) == [*range(16, 513, 16)] and sizes != sorted(sizes)
    assert min(map(min, ids)) >= 3 and max(map(max, ids)) < 199
    assert ids == Arrival(prompts=32, longest=512, tokens=2, batch=9).ids(199)
    assert sorted(map(len, Arrival(prompts=5, longest=3, tokens=1).ids(199))) == [1, 2, 2, 3, 3]


def test_rate_counts_the_new_tokens_of_all_texts():
    case = Arrival(prompts=32, longest=512, tokens=64, batch=8)
    assert case.name == "32 x pp512+tg64"
    work = case.work(find("tiny").config, 4)
    figures = ModelResult(case, OURS, "float32", "ok", work, 0.0, (4.0, 2.0, 9.0)).figures(ROOF)
    assert figures["tokens_per_s"] == 32 * 64 / 4 and figures["total_s"] == 4
    assert not {"mfu", "mbu", "token_p50_s", "bytes_per_token"} & figures.keys()
    long = Arrival(prompts=2, longest=16384, tokens=1)
    assert long.status(find("tiny").config).startswith("cannot: 16385 tokens exceed the context")
    assert [x.batch for x in arrivals([4, 0], [8, 0], [2], [1, 3])] == [1, 3]


@pytest.mark.parametrize("name", ARRIVAL_PROVIDERS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_each_provider_passes_the_check(name, dtype, judge):
    provider = ARRIVAL_PROVIDERS[name](find("tiny"), dtype, CPU)
    ids = CASE.ids(judge.vocab_size)
    provider.start(CASE.batch, CASE.room, CASE.kind)
    texts = provider.texts(ids, CASE.tokens)
    assert check_texts(judge, ids, texts, CASE.tokens, dtype) < 0.1
    assert provider.texts(ids, CASE.tokens) == texts


def test_texts_that_are_not_greedy_are_wrong(judge):
    ids = CASE.ids(judge.vocab_size)
    found = [greedy(prompt, 4) for prompt in ids]
    texts = [text for text, _ in found]
    assert min(min(gaps) for _, gaps in found) > 1e-3, "a tie would hide a wrong token"
    assert check_texts(judge, ids, texts, 4, FP32) == 0
    for row in (0, 4):  # the first and the last text are always among those that are read
        wrong = [*texts]
        wrong[row] = [*texts[row][:3], texts[row][3] ^ 1]
        with pytest.raises(Wrong, match=r"sd below the best logit, limit 0\.0001"):
            check_texts(judge, ids, wrong, 4, FP32)
    mixed_up = [texts[-1], *texts[:-1]]
    with pytest.raises(Wrong, match=r"sd below the best logit, limit 0\.1"):
        check_texts(judge, ids, mixed_up, 4, BF16)
    for short in ([*texts[:-1], texts[-1][:3]], texts[:-1]):
        with pytest.raises(Wrong, match="there are not 5 texts of 4 new tokens"):
            check_texts(judge, ids, short, 4, FP32)


def test_texts_that_fail_are_errors():
    """transformers logs errors, and leaves out the texts; generate_many puts errors in results."""
    model = SimpleNamespace(
        device=CPU, destroy_cached_continuous_batching_manager=lambda: None,
        generate_batch=lambda prompts, **_: texts,
    )  # fmt: skip
    provider = GenerateBatch(model)
    provider.start(2, 300, "arrival")
    done = SimpleNamespace(generated_tokens=[7, 8], error=None)
    texts = {"a": done, "b": done}
    assert provider.texts([[3], [4, 5]], 2) == [[7, 8], [7, 8]]
    texts = {"a": done}
    with pytest.raises(RuntimeError, match="generate_batch: 1 texts are missing"):
        provider.texts([[3], [4, 5]], 2)
    texts = {"a": done, "b": SimpleNamespace(generated_tokens=[], error="no blocks")}
    with pytest.raises(RuntimeError, match="generate_batch: no blocks"):
        provider.texts([[3], [4, 5]], 2)
    ours = ARRIVAL_PROVIDERS[OURS](find("tiny"), FP32, CPU)
    ours.start(2, 300, "arrival")
    with pytest.raises(ValueError, match="token id 199 is outside the vocabulary"):
        ours.texts([[3], [199]], 2)


def test_wrong_provider_is_not_timed_and_fails_the_run(judge, monkeypatch):
    class Constant(Many):
        def texts(self, prompts, new):
            return [[7] * new for _ in prompts]

    def failing(*_):
        raise NotImplementedError("no continuous batching")

    monkeypatch.setitem(ARRIVAL_PROVIDERS, OURS, Constant)
    monkeypatch.setitem(ARRIVAL_PROVIDERS, GENERATE_BATCH, failing)
    monkeypatch.setattr(timing, "ENOUGH", 0)
    names = [OURS, ONE_BY_ONE, GENERATE_BATCH]
    order = groups(find("tiny").config, names, [FP32], CPU)
    found = {x.provider: x for x in run(find("tiny"), [CASE], CPU, order, ROOF, 2, judge)}
    assert found[OURS].status.startswith("wrong: greedy tokens are") and not found[OURS].seconds
    assert found[GENERATE_BATCH].status == "cannot: no continuous batching"
    assert found[ONE_BY_ONE].status == "ok" and len(found[ONE_BY_ONE].seconds) == 2
    assert serious(found.values()) and not serious([found[ONE_BY_ONE], found[GENERATE_BATCH]])


@pytest.mark.usefixtures("roof")
def test_command_measures_all_providers_and_writes_their_ratios(tmp_path):
    options = f"--model tiny --arrival 5 -b 2,3 -p 12 -n 4 -r 2 --out {tmp_path}"
    done = CliRunner().invoke(bench, options.split())
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "results.json").read_text())
    rows = {(x["batch"], x["provider"]): x for x in found["results"]}
    assert len(rows) == 6 and {x["status"] for x in rows.values()} == {"ok"}
    assert {x["test"] for x in rows.values()} == {"5 x pp12+tg4"}
    for batch in (2, 3):
        ours, alone, rival = (rows[batch, x] for x in (OURS, ONE_BY_ONE, GENERATE_BATCH))
        assert ours["tokens_per_s"] == pytest.approx(20 / ours["total_s"])
        assert ours["x_one_by_one"] == pytest.approx(alone["total_s"] / ours["total_s"])
        assert ours["x_generate_batch"] == pytest.approx(rival["total_s"] / ours["total_s"])
    text = (tmp_path / "results.md").read_text()
    assert f"| {rows[2, OURS]['total_s']:.2f} s | {rows[2, OURS]['x_one_by_one']:.2f} |" in text
    assert "new tokens of all texts" in text and "MBU" not in text
    drawn = CliRunner().invoke(plot.main, [str(tmp_path)])
    assert drawn.exit_code == 0, drawn.output
    assert (tmp_path / "results.md").read_text() == text and (tmp_path / "speed.png").exists()
    assert "× one by one | × generate_batch |" in drawn.stdout


def test_ratios_are_of_the_same_batch_size_and_dtype_and_of_float32():
    rates = {
        (8, OURS, "bfloat16"): 90.0, (8, ONE_BY_ONE, "bfloat16"): 30.0, (16, OURS, "float32"): 20.0,
        (8, GENERATE_BATCH, "bfloat16"): 10.0, (8, GENERATE_BATCH, "float32"): 45.0,
    }  # fmt: skip
    rows = [
        {"test": CASE.name, "batch": batch, "provider": name, "dtype": dtype, "tokens_per_s": rate}
        for (batch, name, dtype), rate in rates.items()
    ]
    add_ratios(rows)
    ratios = {key: value for key, value in rows[0].items() if key.startswith("x_")}
    assert ratios == {"x_one_by_one": 3, "x_generate_batch": 9, "x_generate_batch_float32": 2}
    assert not [key for key in rows[2] if key.startswith("x_")]


@pytest.mark.parametrize(
    ("command", "options", "complaint"),
    [
        (bench, "--arrival 4 -d 8", "--arrival has no depth: leave out -d and @"),
        (bench, "--arrival 4 -n 8@32", "--arrival has no depth: leave out -d and @"),
        (bench, "--arrival 4 -n 0", "nothing to test: -p or -n is 0"),
        (bench, "--arrival x", "'x' is not a whole number"),
        (bench, "--arrival 4 --only eager", "no provider eager: choose from gemma_fast, "),
        (bench, f"--only|{ONE_BY_ONE}", f"no provider {ONE_BY_ONE}: choose from eager"),
        (main, "geglu --arrival 4", "--arrival is for the suite model"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(command, options, complaint):
    words = options.split("|") if "|" in options else options.split()
    done = CliRunner().invoke(command, words)
    assert done.exit_code == 2 and complaint in done.output
