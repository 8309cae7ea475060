"""Tests weights that are rounded to 8 and 4 bits while they are read."""

import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import read
from tiny_models import CONFIGS

from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.checkpoint import rounded
from gemma_fast.checkpoint.base import EMBEDDING, Checkpoint
from gemma_fast.checkpoint.open import open_checkpoint
from gemma_fast.checkpoint.random import RandomCheckpoint
from gemma_fast.checkpoint.rounded import RoundedCheckpoint, round_groups, with_quantize
from gemma_fast.kernels.packed import PackedRows, PackedWeight, Packing
from gemma_fast.reference import Reference

WIDE = replace(CONFIGS["gemma3-gqa"], hidden_size=64, intermediate_size=96)
O_PROJ = "model.layers.0.self_attn.o_proj.weight"


class InMemory(Checkpoint):
    """A checkpoint of one matrix, x :: [rows, dim]; packed if `packing` is given."""

    def __init__(self, x, packing=None):
        self.x, self.shapes, self.path = x, {"x": tuple(x.shape)}, Path("memory")
        self.config, self.generation_config, self.kind = WIDE, {}, packing

    def packing(self, name):
        return self.kind

    def packed_rows(self, name, start, stop):
        return PackedRows(self.x[start:stop].to(torch.int8), torch.ones(stop - start, 1), None)

    def rows(self, name, start, stop, device="cpu"):
        return self.x[start:stop]

    def _read(self, name, out):
        out.copy_(self.x)


def rounded_values(x, bits):
    return read(RoundedCheckpoint(InMemory(x), bits), "x")


def plainly_rounded(x, group=32):
    """Rounds with the scale max / 7 of each group."""
    groups = x.unflatten(1, (-1, group))
    scale = groups.abs().amax(-1, keepdim=True).div(7).half().float()
    return (groups / scale).round().clamp(-8, 7).mul(scale).flatten(1)


def squared_error(x, found):
    return float((found - x).double().square().sum())


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("dim", "group"), [(640, 128), (192, 64), (96, 32), (48, 16)], ids=str)
def test_int8_takes_the_largest_group_and_errs_by_half_a_step(dim, group):
    x = normal(10, dim)
    checkpoint = RoundedCheckpoint(InMemory(x), 8)
    assert checkpoint.packing("x") == Packing(8, group, False, torch.float16)
    step = x.unflatten(1, (-1, group)).abs().amax(-1, keepdim=True) / 127
    found = rounded_values(x, 8).unflatten(1, (-1, group))
    assert ((found - x.unflatten(1, (-1, group))).abs() <= 0.53 * step).all()


def test_int4_has_a_third_less_squared_error_than_plain_rounding():
    x = normal(512, 640)
    ours, plain = (squared_error(x, y) for y in (rounded_values(x, 4), plainly_rounded(x)))
    assert ours < 0.71 * plain


def test_int4_finds_nearly_the_best_scale():
    """Compares with 400 scales of both signs for each group."""
    x = normal(64, 1, 32)
    best = torch.full((64,), torch.inf)
    peak = x.abs().amax(-1, keepdim=True)
    for largest in torch.linspace(4, 12, 200):
        for scale in (peak / largest, -peak / largest):
            error = ((x / scale).round().clamp(-8, 7) * scale - x).square().sum((1, 2))
            best = torch.minimum(best, error)
    values, scale = round_groups(x, 4)
    ours = (values.float() * scale.float() - x[:, 0]).square().sum(-1)
    assert ours.sum() < 1.01 * best.sum()


def test_int4_beats_plain_rounding_on_the_demo_weights(demo_gguf):
    checkpoint = open_checkpoint(demo_gguf)
    for name in (EMBEDDING, O_PROJ, "model.layers.9.mlp.gate_proj.weight"):
        x = checkpoint.rows(name, 0, 512).bfloat16().float()
        assert squared_error(x, rounded_values(x, 4)) < 0.8 * squared_error(x, plainly_rounded(x))


@pytest.mark.parametrize("bits", [8, 4])
def test_groups_of_zeros_stay_zeros(bits):
    x = normal(3, 256)
    x[1] = 0
    found = rounded_values(x, bits)
    assert (found[1] == 0).all() and (found[0] != 0).any()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [1e-6, 1e-5, 1e-4, 1e-3, 1e3, 1e5], ids=str)
def test_scales_near_the_limits_of_float16_lose_little(bits, size):
    """Scales are subnormal below 6.1e-5, and multiples of 6e-8."""
    x = normal(8, 256) * size
    scale = float(x.abs().max()) / (127 if bits == 8 else 7)
    error = float((rounded_values(x, bits) - x).abs().max())
    assert error < max(0.6 * scale, 6e-8)


@pytest.mark.parametrize("size", [1e-39, 1e-44, 0.0], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_below_float16_become_zero_or_its_smallest_number(bits, size):
    assert rounded_values(normal(8, 256) * size, bits).abs().max() <= 2**-24


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.nan, "tensor x: a weight is NaN or infinite"),
        (torch.inf, "tensor x: a weight is NaN or infinite"),
        (1e9, "tensor x: a weight of 1e.09 is too large for scales in float16"),
    ],
    ids=str,
)
def test_weights_that_cannot_be_rounded_are_refused_by_name(bits, value, message):
    x = normal(4, 256)
    x[2, 77] = value
    with pytest.raises(ValueError, match=message):
        rounded_values(x, bits)


def test_bad_weight_stops_loading_with_its_name(monkeypatch):
    checkpoint = RandomCheckpoint(WIDE)
    rows = RandomCheckpoint.rows

    def bad(*given):
        return rows(*given).fill_(torch.nan) if O_PROJ in given else rows(*given)

    monkeypatch.setattr(RandomCheckpoint, "rows", bad)
    with pytest.raises(ValueError, match=f"random weights: tensor {O_PROJ}: a weight is NaN"):
        GemmaForCausalLM.from_checkpoint(checkpoint, quantize="int8", device="cpu")


@pytest.mark.parametrize("bits", [8, 4])
def test_values_do_not_depend_on_the_rows_that_are_read_at_once(bits, monkeypatch):
    x = normal(50, 256)
    whole = rounded_values(x, bits)
    monkeypatch.setattr(rounded, "BLOCK", 256 * 3)
    monkeypatch.setattr(rounded, "READ", 256 * 7)
    assert rounded_values(x, bits).equal(whole)
    checkpoint = RoundedCheckpoint(InMemory(x), bits)
    assert checkpoint.rows("x", 11, 13).equal(whole[11:13])


def test_weights_packed_with_more_bits_are_rounded_and_others_kept():
    x = torch.arange(-64, 64).float().repeat(3, 1)
    wide = InMemory(x, Packing(8, 128, False, torch.float16))
    assert RoundedCheckpoint(wide, 4).packing("x") == Packing(4, 32, False, torch.float16)
    for bits in (8, 16):
        kept = RoundedCheckpoint(wide, bits)
        assert kept.packing("x") == (wide.kind if bits == 8 else None)
        assert read(kept, "x").equal(x)
    assert RoundedCheckpoint(wide, 8).packed_rows("x", 1, 2).values.equal(x[:1].to(torch.int8))


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_model_computes_with_the_values_of_the_rounded_checkpoint(quantize):
    checkpoint = with_quantize(RandomCheckpoint(WIDE), quantize)
    model = GemmaForCausalLM.from_checkpoint(
        RandomCheckpoint(WIDE), quantize=quantize, dtype="float32", device="cpu"
    )
    assert (
        sum(isinstance(module, PackedWeight) for module in model.modules())
        == 1 + 4 * WIDE.num_hidden_layers
    )
    reference = Reference.from_checkpoint(checkpoint, dtype=torch.float32, device="cpu")
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=0, atol=1e-5)
    plain = Reference.from_checkpoint(RandomCheckpoint(WIDE), dtype=torch.float32, device="cpu")
    assert (plain(ids).logits - reference(ids).logits).abs().max() > 1e-3
    unpacked = GemmaForCausalLM.from_checkpoint(
        checkpoint, quantize="none", dtype="float32", device="cpu"
    )
    assert unpacked.embed_tokens.equal(reference.weights[EMBEDDING])


def test_rows_that_do_not_divide_into_groups_stay_as_they_are_with_one_warning():
    config = CONFIGS["gemma3-gqa"]  # hidden_size 48
    with pytest.warns(UserWarning, match="not packed in 4 bits, because 32 does not") as caught:
        model = GemmaForCausalLM.from_checkpoint(
            RandomCheckpoint(config), quantize="int4", dtype="float32", device="cpu"
        )
    assert len(caught) == 1
    packed = {n for n, module in model.named_modules() if isinstance(module, PackedWeight)}
    assert packed and all(name.endswith("o_proj") for name in packed)
    ids = torch.arange(3, 40)[None]
    assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize("quantize", ["int5", 4, ["int4"], {"bits": 4}], ids=str)
def test_unknown_quantize_is_refused(quantize):
    message = f"quantize={quantize!r} is not one of 'int8', 'int4', 'none'"
    with pytest.raises(ValueError, match=re.escape(message)):
        GemmaForCausalLM.from_checkpoint(RandomCheckpoint(WIDE), quantize=quantize)


def test_random_rows_are_those_of_the_whole_tensor(monkeypatch):
    monkeypatch.setattr("gemma_fast.checkpoint.random.PART", 1000)
    checkpoint = RandomCheckpoint(WIDE)
    whole = read(checkpoint, EMBEDDING)
    spans = [(0, 7), (7, 60), (60, 90), (10, 12), (11, 199), (0, 400)]
    for start, stop in spans:
        assert checkpoint.rows(EMBEDDING, start, stop).equal(whole[start:stop])
    assert checkpoint.rows(O_PROJ, 3, 5).equal(read(checkpoint, O_PROJ)[3:5])


@pytest.mark.parametrize("family", ["gemma4-all", "gemma-mqa", "gemma2-gqa"])
def test_every_family_is_rounded(family):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rows of 48
        checkpoint = with_quantize(RandomCheckpoint(CONFIGS[family]), "int8")
        model = GemmaForCausalLM.from_checkpoint(checkpoint, dtype="float32", device="cpu")
    reference = Reference.from_checkpoint(checkpoint, dtype=torch.float32, device="cpu")
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=0, atol=2e-5)
    assert model.norm.equal(reference.weights["model.norm.weight"])
