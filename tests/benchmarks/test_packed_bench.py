"""Tests the model benchmark with packed weights: its providers, its judge and its bytes."""

import ctypes
import json
import sys
from contextlib import suppress
from types import ModuleType, SimpleNamespace

import pytest
import torch
from checkpoints import write_gguf
from click.testing import CliRunner
from gguf import GGMLQuantizationType, quants
from tiny_models import CONFIGS

from gemma_fast.benchmarks.measure import machine, timing
from gemma_fast.benchmarks.measure.machine import Roof
from gemma_fast.benchmarks.measure.outcome import EAGER, LLAMA_CPP, OURS, UNPACKED, Wrong
from gemma_fast.benchmarks.model.cases import Case, pass_work
from gemma_fast.benchmarks.model.judge import Judge
from gemma_fast.benchmarks.model.llama import LlamaCpp
from gemma_fast.benchmarks.model.providers import BESIDE_PACKED, PROVIDERS
from gemma_fast.checkpoint.open import open_checkpoint
from gemma_fast.checkpoint.random import RandomCheckpoint
from gemma_fast.checkpoint.rounded import RoundedCheckpoint, with_quantize
from gemma_fast.cli import commands

pytestmark = pytest.mark.filterwarnings("ignore:.*are not packed in")
CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
TG2 = Case("tg", 2)
CONFIG = CONFIGS["gemma3-gqa"]


def bench(*arguments):
    return CliRunner().invoke(commands.main, ["bench", "--model", "tiny", *arguments])


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "measure_roof", lambda *_: Roof(copy=2e12, product=1e15))
    monkeypatch.setattr(timing, "ENOUGH", 0)


@pytest.mark.usefixtures("quick")
def test_packed_weights_stand_beside_unpacked_ones():
    names = (EAGER, OURS, UNPACKED, LLAMA_CPP)
    only = [word for name in names for word in ("--only", name)]
    only += ["--dtype", "float32,bfloat16"]
    done = bench("-p", "0", "-n", "2", "-r", "1", "-o", "json", "--quantize", "int8", *only)
    assert done.exit_code == 0, done.output
    rows = {(x["provider"], x["dtype"]): x for x in json.loads(done.stdout)["results"]}
    llama = rows.pop((LLAMA_CPP, None))
    assert list(rows) == [(x, kind) for x in names[:3] for kind in ("float32", "bfloat16")]
    assert llama["status"] == "cannot: reads .gguf files, without --quantize"
    assert {x["status"] for x in rows.values()} == {"ok"}
    ours = rows[OURS, "bfloat16"]
    wide, half = rows[UNPACKED, "float32"], rows[UNPACKED, "bfloat16"]
    assert wide["size_bytes"] == 2 * half["size_bytes"] == 4 * half["params"]
    assert ours["size_bytes"] < 0.8 * half["size_bytes"]  # rows of 88 columns stay unpacked
    assert ours["bytes_per_token"] < 0.8 * half["bytes_per_token"]


@pytest.mark.usefixtures("quick")
def test_providers_beside_packed_weights_do_not_run_for_unpacked_ones(monkeypatch):
    ran = []
    monkeypatch.setattr(
        "gemma_fast.benchmarks.model.command.run",
        lambda *given: ran.append([name for name, _ in given[3][0]]) or iter(()),
    )
    assert bench("-n", "1").exit_code == bench("-n", "1", "--quantize", "int8").exit_code == 0
    usual, packed = ran
    assert set(packed) - set(usual) == set(BESIDE_PACKED) and packed == list(PROVIDERS)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_judge_compares_packed_weights_with_their_unpacked_values(dtype, quantize):
    checkpoint = with_quantize(RandomCheckpoint(CONFIG), quantize)
    judge = Judge(checkpoint, dtype, CPU)
    for name, kind in ((OURS, dtype), (UNPACKED, FP32), (UNPACKED, BF16)):
        provider = PROVIDERS[name](checkpoint, kind, CPU)
        provider.start(1, judge.room(TG2), TG2.kind)
        limit = {FP32: 1e-5, BF16: 0.03}[kind]
        assert judge.check(name, provider, TG2, kind) < limit
    plain = PROVIDERS[OURS](RandomCheckpoint(CONFIG), FP32, CPU)
    plain.start(1, judge.room(TG2), TG2.kind)
    with pytest.raises(Wrong, match=r"error .* exceeds the limit"):
        judge.check(OURS, plain, TG2, FP32)


class Swapped(RoundedCheckpoint):
    """Gives the model packed rows in which two groups' scales are swapped."""

    def packed_rows(self, name, start, stop):
        rows = super().packed_rows(name, start, stop)
        return rows._replace(scale=rows.scale.flip(1))


def test_judge_detects_swapped_scales_in_float32():
    plain = RandomCheckpoint(CONFIG)
    judge = Judge(RoundedCheckpoint(plain, 8), BF16, CPU)
    provider = PROVIDERS[OURS](Swapped(plain, 8), FP32, CPU)
    provider.start(1, judge.room(TG2), TG2.kind)
    with pytest.raises(Wrong):
        judge.check(OURS, provider, TG2, FP32)


def test_bytes_of_packed_tensors_replace_those_of_the_dtype():
    name = "model.layers.0.mlp.gate_proj.weight"
    rows, dim = CONFIG.tensor_shapes()[name]
    plain, packed = (pass_work(CONFIG, 2, 1, 5, 1, sizes) for sizes in ({}, {name: 0.5}))
    assert plain.bytes - packed.bytes == 1.5 * rows * dim and plain.flops == packed.flops
    table = "model.embed_tokens_per_layer.weight"
    config = CONFIGS["gemma4-all"]
    plain, packed = (pass_work(config, 2, 3, 5, 1, sizes) for sizes in ({}, {table: 0.5}))
    assert plain.bytes - packed.bytes == 1.5 * 3 * config.num_hidden_layers * 16


def test_a_model_counts_the_bytes_that_its_weights_take():
    checkpoint = with_quantize(RandomCheckpoint(CONFIG), "int8")
    ours = PROVIDERS[OURS](checkpoint, FP32, CPU)
    sizes = ours.sizes()
    assert sizes.keys() == CONFIG.tensor_shapes().keys()
    assert sizes["model.embed_tokens.weight"] == 1 + 2 / 16
    assert sizes["model.norm.weight"] == sizes["model.layers.0.mlp.down_proj.weight"] == 4


@pytest.fixture
def gguf(tmp_path):
    kind, path = GGMLQuantizationType.Q8_0, tmp_path / "x.gguf"
    write_gguf(path, "gemma3", quantize=lambda t: (quants.quantize(t.numpy(), kind), kind))
    return path


@pytest.mark.usefixtures("quick")
def test_run_without_llama_cpp_says_so_and_measures_the_others(gguf, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    options = f"--model {gguf} -p 0 -n 2 -r 1 --only {OURS} --only {LLAMA_CPP}"
    done = CliRunner().invoke(commands.main, ["bench", *options.split()])
    assert done.exit_code == 0, done.output
    (line,) = (x for x in done.stdout.splitlines() if x.startswith("| tg2 | llama.cpp |"))
    assert "| not installed: import of llama_cpp halted" in line
    assert "loaded in" not in next(x for x in done.stderr.splitlines() if x.startswith(LLAMA_CPP))


def test_llama_cpp_runs_as_llama_bench_does(gguf, monkeypatch):
    """As many threads as PyTorch, a prompt of 512 tokens in one part, logits of its last token."""
    fake = Fake("llama_cpp")
    vocab = open_checkpoint(gguf).config.vocab_size
    given, parts = SimpleNamespace(swa_full=True), []
    rows = torch.zeros(2, vocab).numpy()
    rows[0, 7] = rows[1, 9] = 1.0

    def batch(n, embd, sequences):
        seq_ids = [[None] for _ in range(n)]
        return SimpleNamespace(
            token=[0] * n, pos=[0] * n, n_seq_id=[0] * n, seq_id=seq_ids, logits=[0] * n, n_tokens=0
        )

    def decode(context, x):
        wanted = [i for i in range(x.n_tokens) if x.logits[i]]
        parts.append((x.token[: x.n_tokens], x.pos[: x.n_tokens], wanted))
        return 0

    fake.llama_context_default_params = lambda: given
    fake.llama_batch_init, fake.llama_decode = batch, decode
    pointer = ctypes.POINTER(ctypes.c_float)
    fake.llama_get_logits_ith = lambda context, i: rows[len(parts) % 2].ctypes.data_as(pointer)
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    provider = LlamaCpp(open_checkpoint(gguf), BF16, CPU)
    provider.start(1, 600, "pp")
    assert given.n_threads == given.n_threads_batch == torch.get_num_threads()
    assert given.n_batch == given.n_ubatch == 512 and given.n_ctx > 600 and not given.swa_full
    ids = torch.arange(513) % vocab
    assert provider.prefill(ids[None, :512]).tolist() == [9]
    assert provider.step().tolist() == [7]
    assert provider.extend(ids[None]).tolist() == [7]
    assert parts[0] == (ids[:512].tolist(), [*range(512)], [511])
    assert parts[1] == ([9], [512], [0])
    assert [wanted for *_, wanted in parts[2:]] == [[], [0]]
    assert provider.logits(ids[None, :3]).shape == (1, 3, vocab)
    assert parts[-1][2] == [0, 1, 2]


def test_llama_cpp_runs_only_files_that_it_reads(gguf, monkeypatch):
    """A package in place of llama-cpp-python, which has no wheel."""
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    checkpoint = open_checkpoint(gguf)
    with pytest.raises(ImportError):
        LlamaCpp(checkpoint, BF16, CPU)
    for other in (with_quantize(checkpoint, "int4"), RandomCheckpoint(CONFIG)):
        with pytest.raises(NotImplementedError, match=r"reads \.gguf files"):
            LlamaCpp(other, BF16, CPU)
    fake = Fake("llama_cpp")
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    fake.llama_model_load_from_file = lambda path, options: None
    with pytest.raises(ValueError, match=r"llama.cpp does not load .*x.gguf"):
        LlamaCpp(checkpoint, BF16, CPU)


@pytest.mark.parametrize(("size", "passes"), [(0.15, [LLAMA_CPP]), (0.25, [])])
def test_llama_cpp_has_a_limit_of_its_own(size, passes, monkeypatch):
    """It rounds activations to 8 bits."""
    judge = Judge(RandomCheckpoint(CONFIG), BF16, CPU)
    provider = PROVIDERS[OURS](RandomCheckpoint(CONFIG), BF16, CPU)
    provider.start(1, judge.room(TG2), TG2.kind)
    monkeypatch.setattr(judge, "judge", lambda *_: (size, 0.0))
    found = []
    for name in (OURS, LLAMA_CPP):
        with suppress(Wrong):
            judge.check(name, provider, TG2, BF16)
            found.append(name)
    assert found == passes


@pytest.mark.slow
def test_llama_cpp_computes_the_demo(demo_gguf):
    pytest.importorskip("llama_cpp")
    checkpoint = open_checkpoint(demo_gguf)
    judge, provider = Judge(checkpoint, BF16, CPU), LlamaCpp(checkpoint, BF16, CPU)
    provider.start(1, judge.room(TG2), TG2.kind)
    assert 0.02 < judge.check(LLAMA_CPP, provider, TG2, BF16) < 0.2
    assert provider.sizes()["model.embed_tokens.weight"] == 34 / 32  # Q8_0


class Fake(ModuleType):
    def __getattr__(self, name):
        return lambda *_: type("Options", (), {})()
