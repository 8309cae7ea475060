"""Tests the model benchmark with packed weights: its providers, its judge and its bytes."""

import json
import sys
from contextlib import suppress
from types import ModuleType

import pytest
import torch
from checkpoints import write_gguf
from click.testing import CliRunner
from gguf import GGMLQuantizationType, quants
from tiny_models import CONFIGS

from gemma_fast import cli
from gemma_fast.benchmarks.measure import machine, timing
from gemma_fast.benchmarks.measure.machine import Roof
from gemma_fast.benchmarks.measure.outcome import EAGER, OURS, Wrong
from gemma_fast.benchmarks.model.cases import Case, pass_work
from gemma_fast.benchmarks.model.judge import Judge
from gemma_fast.benchmarks.model.llama import LlamaCpp
from gemma_fast.benchmarks.model.providers import (
    BESIDE_PACKED,
    LLAMA_CPP,
    PROVIDERS,
    UNPACKED_16,
    UNPACKED_32,
)
from gemma_fast.checkpoint.open import open_checkpoint
from gemma_fast.checkpoint.random import RandomCheckpoint
from gemma_fast.checkpoint.rounded import RoundedCheckpoint, with_quantize

pytestmark = pytest.mark.filterwarnings("ignore:.*are not packed in")
CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
TG2 = Case("tg", 2)
CONFIG = CONFIGS["gemma3-gqa"]


def bench(*arguments):
    return CliRunner().invoke(cli.main, ["bench", "--model", "tiny", *arguments])


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "measure_roof", lambda *_: Roof(copy=2e12, product=1e15))
    monkeypatch.setattr(timing, "ENOUGH", 0)


@pytest.mark.usefixtures("quick")
def test_packed_weights_stand_beside_unpacked_ones():
    names = (EAGER, OURS, UNPACKED_32, UNPACKED_16, LLAMA_CPP)
    only = [word for name in names for word in ("--only", name)]
    done = bench("-p", "0", "-n", "2", "-r", "1", "-o", "json", "--quantize", "int8", *only)
    assert done.exit_code == 0, done.output
    rows = {row["provider"]: row for row in json.loads(done.stdout)["results"]}
    assert list(rows) == list(names)
    assert rows[LLAMA_CPP]["status"] == "cannot: reads .gguf files, without --quantize"
    ours, wide, half = (rows[name] for name in (OURS, UNPACKED_32, UNPACKED_16))
    assert {x["status"] for x in (rows[EAGER], ours, wide, half)} == {"ok"}
    assert wide["size_bytes"] == 2 * half["size_bytes"] == 4 * half["params"]
    assert ours["size_bytes"] < 0.8 * half["size_bytes"]  # rows of 88 columns stay unpacked
    assert ours["bytes_per_token"] < 0.8 * half["bytes_per_token"]


@pytest.mark.usefixtures("quick")
def test_providers_beside_packed_weights_do_not_run_for_unpacked_ones(monkeypatch):
    ran = []
    monkeypatch.setattr(
        "gemma_fast.benchmarks.model.command.run",
        lambda *given: ran.append(given[6]) or iter(()),
    )
    assert bench("-n", "1").exit_code == bench("-n", "1", "--quantize", "int8").exit_code == 0
    usual, packed = ran
    assert set(packed) - set(usual) == set(BESIDE_PACKED) and packed == list(PROVIDERS)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_judge_compares_packed_weights_with_their_unpacked_values(dtype, quantize):
    checkpoint = with_quantize(RandomCheckpoint(CONFIG), quantize)
    judge = Judge(checkpoint, dtype, CPU)
    for name, kind in ((OURS, dtype), (UNPACKED_32, FP32), (UNPACKED_16, BF16)):
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


def test_llama_cpp_runs_only_files_that_it_reads(tmp_path, monkeypatch):
    """A package in place of llama-cpp-python, which has no wheel."""
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    kind = GGMLQuantizationType.Q8_0
    path = tmp_path / "x.gguf"
    write_gguf(path, "gemma3", quantize=lambda t: (quants.quantize(t.numpy(), kind), kind))
    checkpoint = open_checkpoint(path)
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
