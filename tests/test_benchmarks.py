"""The benchmarks' own truth, without a GPU: what is refused, what is listed, and the arithmetic."""

import json
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from benchmarks import harness, report, timing
from benchmarks.__main__ import main
from benchmarks.bench_model import find
from benchmarks.harness import COPY, EAGER, OURS, Result, Suite, run
from benchmarks.machine import Roof, Work
from benchmarks.plots import plot
from benchmarks.suites import SUITES
from benchmarks.timing import Times

CPU, FP32 = torch.device("cpu"), torch.float32
ROOF = Roof(copy=2e12, product=1e15)
STAMP = {
    "gpu": "GPU", "cpu": None, "driver": "580", "torch": "2.13", "triton": "3.7", "python": "3.12",
    "dtype": "bfloat16", "commit": "abc", "date": "2026-11-21",
}  # fmt: skip


def missing(x):
    raise ModuleNotFoundError("No module named 'rival'", name="rival")


def windowless(x):
    raise NotImplementedError("no window")


def broken(x):
    raise RuntimeError("illegal instruction\nand a long story")


PROVIDERS = {
    EAGER: lambda x: lambda: x * 2,
    "off": lambda x: lambda: x * 2.001,
    "NaN": lambda x: lambda: torch.where(x > 1, torch.nan, x * 2),
    "infinite": lambda x: lambda: torch.where(x > 1, torch.inf, x * 2),
    "other shape": lambda x: lambda: (x * 2)[:1],
    "other dtype": lambda x: lambda: (x * 2).double(),
    "two outputs": lambda x: lambda: (x * 2, x),
    "absent": missing,
    "unable": windowless,
    "broken": broken,
    OURS: lambda x: lambda: x + x,
}
SUITE = Suite(
    name="double",
    about="2 * x of [n]",
    bound="memory",
    sizes={"large": {"n": 1 << 20}},
    tiny={"small": {"n": 64}},
    inputs=lambda device, dtype, n: (torch.randn(n, device=device, dtype=dtype),),
    oracle=lambda x: 2 * x,
    work=lambda itemsize, n: Work(2 * n * itemsize, n),
    providers=PROVIDERS,
)


def statuses(suite=SUITE, size="small", **options):
    return {r.provider: r.status for r in run(suite, size, CPU, FP32, None, **options)}


def test_every_provider_is_listed_with_its_fate():
    found = statuses()
    assert list(found) == [*PROVIDERS, COPY]
    assert found[EAGER] == found[OURS] == "ok, not measured"
    assert found["off"] == "wrong: error 0.0005, more than 1e-05"
    assert found["NaN"] == "wrong: error nan, more than 1e-05"
    assert found["infinite"] == "wrong: error inf, more than 1e-05"
    assert found["other shape"].startswith("wrong: gives")
    assert found["other dtype"].startswith("wrong: gives")
    assert found["two outputs"].startswith("wrong: gives")
    assert found["absent"] == "not installed: No module named 'rival'"
    assert found["unable"] == "cannot: no window"
    assert found["broken"] == "failed: illegal instruction"


@pytest.mark.parametrize("clock", ["graph", "wall"])
def test_wrong_provider_is_not_timed(monkeypatch, clock):
    timed = []

    def calls(suite, name, *_):
        timed.append(name)
        return [lambda: None]

    times = Times(1e-3, 1e-3, 1e-3)
    monkeypatch.setattr(harness, "calls", calls)
    monkeypatch.setattr(harness, "device_times", lambda calls: (times, True))
    results = list(run(replace(SUITE, clock=clock), "large", CPU, FP32, ROOF))
    assert timed == [EAGER, OURS, COPY]
    assert sorted(r.provider for r in results if r.times) == sorted(timed)
    assert all(r.graph == (clock == "graph") for r in results if r.times)


def test_oracle_sees_its_own_fp32_copies():
    seen = []

    def oracle(x):
        seen.append(x.dtype)
        return x.mul_(2)

    for dtype in (torch.bfloat16, torch.float32):
        (result,) = run(replace(SUITE, oracle=oracle), "small", CPU, dtype, None, [OURS])
        assert result.status == "ok, not measured"
    assert seen == [torch.float32] * 2


def test_one_rounding_passes_and_a_forgotten_detail_does_not():
    for dtype, one_rounding in [(torch.bfloat16, 1.7e-3), (torch.float16, 2.1e-4)]:
        exact = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
        off = harness.error(exact.to(dtype), exact)
        assert off == pytest.approx(one_rounding, rel=0.1)
        assert off * 2 < harness.TOLERANCE[dtype] < off * 3.1


def result(provider, seconds=None, status="ok", suite="rms_norm", size="8192 x 2048", flops=4e7):
    times = seconds and Times(seconds, seconds * 0.9, seconds * 1.1)
    return Result(suite, size, provider, status, Work(6e7, flops), 1e-3, times, bool(times))


def test_figures_of_a_made_up_time():
    x = result(OURS, seconds=40e-6).figures(ROOF)
    assert x["median_us"] == pytest.approx(40)
    assert x["GB_per_s"] == pytest.approx(1500)  # 6e7 bytes / 40e-6 s
    assert x["TFLOP_per_s"] == pytest.approx(1)  # 4e7 FLOPs / 40e-6 s
    assert x["bound"] == "memory" and x["share_of_roof"] == pytest.approx(0.75)
    x = result(OURS, seconds=40e-6, flops=2e10).figures(ROOF)  # 20 µs of products, 30 of bytes
    assert x["bound"] == "memory"
    x = result(OURS, seconds=400e-6, flops=2e11).figures(ROOF)
    assert x["bound"] == "compute" and x["share_of_roof"] == pytest.approx(0.5)
    assert result(OURS).figures(ROOF) == {}


def test_speed_up_over_eager_of_the_same_size():
    results = [
        result(EAGER, 80e-6), result(OURS, 20e-6), result("liger", status="not installed: x"),
        result(OURS, 10e-6, size="1 x 1"),
    ]  # fmt: skip
    found = report.speedups(results)
    assert found["rms_norm", "8192 x 2048", OURS] == pytest.approx(4)
    assert len(found) == 2


def test_files_of_made_up_results(tmp_path):
    results = [
        result(EAGER, 80e-6), result(OURS, 40e-6), replace(result("quack", 50e-6), graph=False),
        result("liger", status="not installed: No module named 'liger_kernel'"),
        result(COPY, 38e-6, flops=0),
        result(EAGER, 3e-3, suite="attention", size="a", flops=1e11),
        result(OURS, 2e-3, suite="attention", size="a", flops=1e11),
    ]  # fmt: skip
    about = {"rms_norm": "RMSNorm", "attention": "Attention"}
    report.write(tmp_path, STAMP, ROOF, results, about)
    plot(tmp_path, ROOF, results, "GPU")

    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["stamp"] == STAMP
    assert saved["roof"] == {"copy_GB_per_s": 2000, "product_TFLOP_per_s": 1000}
    assert [x["provider"] for x in saved["results"]] == [r.provider for r in results]
    assert saved["results"][1]["x_eager"] == pytest.approx(2)
    assert saved["results"][2]["graph"] is False
    assert "median_us" not in saved["results"][3]

    text = (tmp_path / "results.md").read_text()
    ours = "| 8192 x 2048 | gemma_fast | 40.0 µs (36.0 … 44.0) | 1500 GB/s | 0.75 | 2.00 |"
    assert ours in text
    assert "| quack \\* | 50.0 µs" in text and report.FOOTNOTE in text
    assert "| liger | not installed: No module named 'liger_kernel' |" in text
    assert "## attention" in text and report.NOTHING not in text
    assert "commit abc" in text and "copy 2000 GB/s" in text
    for name in ("speedup.png", "roofline.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) <= 8


CASES = [(name, size) for name, suite in SUITES.items() for size in suite.tiny]


@pytest.mark.parametrize(("name", "size"), CASES, ids=str)
def test_tiny_sizes_run(name, size):
    found = statuses(SUITES[name], size, names=[EAGER, OURS])
    assert found == {EAGER: "ok, not measured", OURS: "ok, not measured"}


@pytest.mark.parametrize("name", SUITES)
def test_suites_have_inputs_for_every_size_and_no_zeros(name):
    suite = SUITES[name]
    for size in suite.tiny.values():
        inputs = harness.make_inputs(suite, size, CPU, FP32, seed=0)
        tensors = [x for x in inputs if isinstance(x, torch.Tensor) and x.is_floating_point()]
        assert all(x.abs().sum() > 0 for x in tensors)
        again = harness.make_inputs(suite, size, CPU, FP32, seed=0)
        assert all(torch.equal(a, b) for a, b in zip(inputs, again, strict=True)
                   if isinstance(a, torch.Tensor))  # fmt: skip
    assert all(min(suite.work(2, **size)) > 0 for size in suite.sizes.values())


def work(name, size):
    return SUITES[name].work(2, **SUITES[name].sizes[size])


def test_work_by_hand():
    m = 1 << 20
    assert work("rms_norm", "512 x 2048") == (4 * m, 4 * m)  # 1 Mi elements, in and out
    assert work("add_rms_norm", "512 x 2048") == (8 * m, 5 * m)
    assert work("add_rms_norm_post", "512 x 2048") == (8 * m, 9 * m)
    assert work("geglu", "512 x 2*16384") == (3 * 8 * m * 2, 10 * 8 * m)
    # k, v, keys, values of 0.5 Mi elements; cos and sin of 0.25 Mi floats each
    assert work("rotary_write", "t 2048, n 1") == (4 * m + 2 * m, 3 * m // 2)
    # q and out of 1 Mi elements, keys and values of 1/8; cos and sin of 1/16 Mi floats each
    pairs = 512 * 513 // 2
    found = work("attention", "t 512, 8/1 heads, d 256")
    assert found == (2 * (2 * m + m // 4) + m // 2, 4 * 8 * 256 * pairs)
    # the first 512 queries see 1 … 512 keys, the other 7680 see 512
    found = work("attention", "t 8192, 4/1 heads, d 256, window 512")
    assert found.flops == 4 * 4 * 256 * (pairs + 7680 * 512)
    found = work("gate_up_geglu", "m 512, k 2048, dim 16384")
    assert found == (2 * (m + 64 * m + 8 * m), 2 * 512 * 2048 * 32768)


def test_work_of_a_model_by_hand():
    config = find("gemma-2b").config
    embedding, layer = 256_000 * 2048, 2048 * (256 * (8 + 2) + 256 * 8 + 3 * 16384 + 2)
    assert config.num_parameters == embedding + 18 * layer + 2048
    cache = 2 * 256 * 512 * 18
    decode = work("model", "gemma-2b, decode 512")
    assert decode.bytes == 2 * (config.num_parameters + cache)
    assert decode.flops == 2 * config.num_parameters + 18 * 4 * 8 * 256 * 512
    prefill = work("model", "gemma-2b, prefill 512")
    products = 2 * (512 * (18 * layer + 2048) + embedding)
    assert prefill.flops == products + 18 * 4 * 8 * 256 * 512 * 513 // 2


def test_turns_time_each_provider_as_often(monkeypatch):
    called = []
    monkeypatch.setattr(timing, "TURNS", (5, 6))
    work = {name: lambda name=name: called.append(name) for name in "ab"}
    times = timing.in_turns(work)
    assert called == ["a", "b"] * 8  # two turns are warm-up
    assert all(0 < x.p20 <= x.median <= x.p80 for x in times.values())


@pytest.fixture
def fake_gpu(monkeypatch):
    """Stands in for torch.cuda: a call takes 2^-17 s in a graph, and 2^-13 with its launch."""
    gpu = SimpleNamespace(now=0.0, capturing=False, refuses=False, captured=[])

    def call():
        gpu.captured[-1] += gpu.capturing
        gpu.now += 0 if gpu.capturing else 2**-13

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = gpu.now

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3  # ms

    class CUDAGraph:
        def replay(self):
            gpu.now += 2**-17 * self.calls

    @contextmanager
    def graph(made):
        gpu.captured.append(0)
        gpu.capturing = True
        yield
        gpu.capturing, made.calls = False, gpu.captured[-1]
        if gpu.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")

    gpu.call, gpu.captured = call, [0]
    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "Event": Event, "CUDAGraph": CUDAGraph, "graph": graph, "synchronize": lambda: None,
        "Stream": lambda: stream, "current_stream": lambda: stream, "stream": nullcontext,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1000),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return gpu


def test_graph_cycles_until_a_replay_is_long_enough(fake_gpu):
    times, graph = timing.device_times([fake_gpu.call] * 4)
    assert graph and times == pytest.approx((2**-17,) * 3)
    assert fake_gpu.captured == [0, 4, 4 * 33]  # 33 / 2^15 of a second


def test_what_cannot_be_captured_is_timed_with_its_launches(fake_gpu):
    fake_gpu.refuses = True
    times, graph = timing.device_times([fake_gpu.call] * 4)
    assert not graph and times == pytest.approx((2**-13,) * 3)


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize("name", [OURS, COPY])
def test_sets_of_inputs_pass_twice_the_l2_cache(name):
    seen = []
    providers = {OURS: lambda x: lambda: seen.append(x)}
    made = harness.calls(replace(SUITE, providers=providers), name, {"n": 64}, CPU, FP32)
    assert len(made) == 8  # 256 bytes each: 2048, more than 2000
    outputs = [call() for call in made]
    tensors = seen if name == OURS else outputs
    assert len({x.data_ptr() for x in tensors}) == 8
    assert sum(x.nbytes for x in tensors) == 2048


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
    assert all(x.keys() == {"suite", "size", "provider", "status", "error"} for x in ours)
    assert report.NOTHING in (tmp_path / "results.md").read_text()


@pytest.mark.usefixtures("no_gpu")
def test_command_fails_if_ours_is_wrong(monkeypatch):
    wrong = replace(SUITE, providers={**PROVIDERS, OURS: PROVIDERS["off"]})
    monkeypatch.setitem(SUITES, "double", wrong)
    assert CliRunner().invoke(main, ["double"]).exit_code == 1
    monkeypatch.setitem(SUITES, "double", SUITE)
    assert CliRunner().invoke(main, ["double"]).exit_code == 0


@pytest.mark.usefixtures("no_gpu")
def test_command_measures_a_model_on_a_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.__main__.measure_roof", lambda *_: ROOF)
    small = replace(SUITES["model"], sizes=SUITES["model"].tiny)
    monkeypatch.setattr("benchmarks.__main__.model_suite", lambda *_: small)
    monkeypatch.setattr(timing, "TURNS", (5, 5))
    done = CliRunner().invoke(main, ["model", "--model", "tiny", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert report.NOTHING not in done.output
    saved = json.loads((tmp_path / "results.json").read_text())
    assert all(x["median_us"] > 0 and x["graph"] is False for x in saved["results"])
    assert (tmp_path / "speedup.png").stat().st_size


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["rmsnorm"], "no suite rmsnorm: choose from rms_norm, add_rms_norm"),
        (["geglu", "--model", "demo"], "--model is for the suite model"),
        (["model", "--model", "no/such/model"], "no/such/model"),
    ],
    ids=["suite", "model without its suite", "model"],
)
def test_command_says_what_is_wrong(arguments, complaint):
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code in (1, 2) and isinstance(done.exception, SystemExit)
    assert complaint in done.output


def test_list():
    done = CliRunner().invoke(main, ["--list"])
    assert done.exit_code == 0
    assert all(name in done.output for name in SUITES)
    done = CliRunner().invoke(main, ["rms_norm", "--list"])
    assert "attention" not in done.output and OURS in done.output
