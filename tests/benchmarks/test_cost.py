"""Tests the lines of `gemma-fast verify` about packed weights: their cost in quality and bytes."""

import json

import pytest
import torch
from c_kernels import without_c
from certificate_lines import BF16, CPU, FP32, Loud, failed
from checkpoints import write_gguf
from click.testing import CliRunner
from gguf import GGMLQuantizationType, quants
from tiny_models import CONFIGS

from gemma_fast.benchmarks.kernels import packed_matvec
from gemma_fast.benchmarks.verify import certificate, cost, margins
from gemma_fast.benchmarks.verify import kernels as verify_kernels
from gemma_fast.checkpoint import rounded
from gemma_fast.checkpoint.open import open_checkpoint
from gemma_fast.checkpoint.random import RandomCheckpoint
from gemma_fast.checkpoint.rounded import RoundedCheckpoint, with_quantize
from gemma_fast.cli.commands import main
from gemma_fast.kernels.packed import Weight

pytestmark = pytest.mark.filterwarnings("ignore:.*are not packed in")


def lines(kind="int8", change=lambda packed: packed, dtypes=(FP32, BF16)):
    plain = Loud(CONFIGS["gemma3-gqa"])
    packed = change(with_quantize(plain, kind))
    return list(cost.check_cost(plain, packed, CPU, dtypes))


def test_int8_passes_and_its_bytes_are_counted():
    found = lines()
    assert not failed(found) and {x.part for x in found} == {margins.COST}
    assert [x.dtype for x in found[1:]] == ["float32", "float32", "bfloat16", "bfloat16"]
    figures = {figure.name: figure for figure in found[1].figures}
    assert 0 < figures["KL mean, int8"].ours < figures["KL mean, int8"].limit
    assert figures["|Δ| max, int8"].limit is None
    (size,) = found[2].figures
    assert size.ours < 0.6 * size.eager


def test_int4_costs_more_than_int8_and_that_has_no_limit():
    (_, eight, _), (_, four, _) = lines("int8", dtypes=[FP32]), lines("int4", dtypes=[FP32])
    assert four.figures[0].ours > 3 * eight.figures[0].ours
    assert all(figure.limit is None for figure in four.figures)


def test_rounding_errors_are_those_computed_by_hand():
    """Weights are uniform in -1 … 1, so plain rounding's squared error is step² / 12."""

    class Uniform(RandomCheckpoint):
        def _draw(self, name, device):
            for part in super()._draw(name, device):
                yield part.mul_(1e4).frac_()

    plain = Uniform(CONFIGS["gemma3-gqa"])
    for kind, largest in (("int8", 127), ("int4", 7)):
        ours, usual = cost.rounding_errors(plain, with_quantize(plain, kind))
        assert usual == pytest.approx((3 / 12) ** 0.5 / largest, rel=0.1)
        assert ours < usual * 1.01


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_worse_rounding_fails(kind, monkeypatch):
    """int8 with steps that are 15 % larger than necessary, int4 with plain rounding."""
    larger = lambda scale: scale * (1.15 if kind == "int8" else 1)  # noqa: E731
    monkeypatch.setattr(rounded, "_half", lambda scale: larger(scale).half().float())
    monkeypatch.setattr(rounded, "_search", lambda x, peak: peak.abs() / 7)
    monkeypatch.setattr(rounded, "_fit", lambda x, q: (x.abs().amax(-1, keepdim=True) / 7, None))
    assert failed(lines(kind, dtypes=[])) == {cost.WEIGHTS.format(kind=kind)}


def test_weights_that_the_file_has_packed_keep_their_limits():
    """--quantize int8 rounds none of them."""
    found = lines(change=lambda packed: RoundedCheckpoint(packed, 8), dtypes=[FP32])
    assert {figure.name for figure in found[0].figures} >= {"KL mean, as stored"}


class Shifted(RoundedCheckpoint):
    """Has scales of another group: a mistake in the order of scales."""

    def packed_rows(self, name, start, stop):
        rows = super().packed_rows(name, start, stop)
        return rows._replace(scale=rows.scale.roll(1, 0))


def test_wrong_scales_fail():
    found = lines(change=lambda packed: Shifted(packed.checkpoint, 8))
    assert any(not x.ok for x in found)


def run(*args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_kernels, "CHECKS", verify_kernels.CHECKS[:1])
        patch.setattr(certificate, "interpreted", list)
        return CliRunner().invoke(main, ["verify", "--device", "cpu", "--tokens", "8", *args])


def test_certificate_of_rounded_weights_gives_transformers_the_same_weights():
    result = run("--model", "tiny", "--quantize", "int8", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert "because --quantize rounded the weights" in found["stamp"]["truth"]
    assert found["stamp"]["model"] == "tiny, int8"
    parts = [line["part"] for line in found["lines"]]
    assert parts.count(margins.COST) == 5 and margins.MODEL in parts


def test_exit_status_is_1_if_packed_weights_cost_too_much(monkeypatch):
    limits = margins.MARGINS["KL mean, int8"]
    monkeypatch.setitem(
        margins.MARGINS, "KL mean, int8", limits._replace(float32=(0, 1e-12), half=(0, 1e-12))
    )
    result = run("--model", "tiny", "--quantize", "int8", "--dtype", "float32")
    assert result.exit_code == 1 and "A line FAILED." in result.stdout


def test_unpacked_model_has_no_such_lines():
    result = run("--model", "tiny", "--quantize", "none", "--dtype", "float32", "--json")
    assert result.exit_code == 0, result.output
    assert margins.COST not in [x["part"] for x in json.loads(result.stdout)["lines"]]


def test_three_texts_of_a_packed_file_are_compared(tmp_path):
    """The GGUF file's weights are in Q8_0, and stay packed."""
    path = tmp_path / "x.gguf"
    kind = GGMLQuantizationType.Q8_0
    write_gguf(path, "gemma3", quantize=lambda t: (quants.quantize(t.numpy(), kind), kind))
    plain = open_checkpoint(path)
    assert plain.packing("model.embed_tokens.weight") is not None
    with pytest.MonkeyPatch.context() as patch:
        ids = {name: torch.randint(3, 12, (1, 30 + i)) for i, name in enumerate(cost.TEXTS)}
        patch.setattr(cost, "passages", lambda *_: ids)
        found = list(cost.check_cost(plain, plain, CPU, [FP32]))
    assert not failed(found) and len(found) == 4
    assert all(figure.ours < 1e-6 for figure in found[0].figures[:2])


def test_packed_kernel_checks_pass_and_detect_a_wrong_scale(monkeypatch):
    monkeypatch.setattr(verify_kernels, "CHECKS", packed_matvec.CHECKS)
    check = list(verify_kernels.check_kernels(CPU, [FP32, BF16], margins.CPU_PATH))
    assert not failed(check) and len(check) == 2 * len(packed_matvec.CHECKS)
    unpack = Weight.unpack
    monkeypatch.setattr(Weight, "unpack", lambda self, dtype: unpack(self, dtype) * 1.001)
    with without_c():  # so that the references run, which unpack the weight
        check = list(verify_kernels.check_kernels(CPU, [FP32], margins.CPU_PATH))
    assert failed(check) == {x.name for x in packed_matvec.CHECKS}
