"""Tests Gemma's numerical rules, one per test. Comparing bf16 logits alone would miss mistakes
that are smaller than bf16's rounding errors."""

from dataclasses import replace

import pytest
import torch
import transformers
from oracles import geglu_oracle
from tiny_models import CONFIGS, close, random_model, random_transformers_model
from tolerances import GEGLU_ROUNDINGS, assert_rounded, geglu_size, norm_roundings, pair_size

from gemma_fast import reference
from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.config import FULL, SLIDING
from gemma_fast.kernels.embed import embed
from gemma_fast.kernels.geglu import geglu
from gemma_fast.kernels.rmsnorm import add_rms_norm, rms_norm
from gemma_fast.kernels.rotary import rotate
from gemma_fast.model.cache import KVCache


@pytest.mark.parametrize(
    ("hidden", "scale"), [(640, 25.25), (1152, 34.0), (2048, 45.25), (2304, 48.0), (3072, 55.5)]
)
def test_embedding_scale_is_rounded_to_bf16(hidden, scale):
    config = replace(CONFIGS["gemma-mqa"], hidden_size=hidden)
    model = random_model(config, dtype=torch.bfloat16)
    ids = torch.arange(4).unsqueeze(0)
    expected = (model.embed_tokens[:4].float() * scale).bfloat16()
    walk = reference.embed(ids, model.embed_tokens)
    for embedded in (walk, embed(ids, model.embed_tokens, hidden**0.5)):
        torch.testing.assert_close(embedded[0], expected, rtol=0, atol=0)
    full = model.embed_tokens.float()
    assert embed(ids, full, hidden**0.5)[0, 0, 0] == full[0, 0] * hidden**0.5


def test_one_plus_weight_is_computed_in_fp32():
    """In bf16, 1 + 15.8125 would be rounded to 16.75, and 1 + 2**-9 to 1."""
    weight = torch.tensor([15.8125, 2.0**-9] * 32, dtype=torch.bfloat16)
    x = torch.randn(8, 64)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    exact *= 1 + weight.double()
    for out in (
        rms_norm(x, weight),
        add_rms_norm(x, torch.zeros_like(x), weight)[0],
        reference.rms_norm(x, weight, 1e-6),
    ):
        assert_rounded(out, exact, norm_roundings(64))


def test_norm_is_rounded_once():
    """Llama also rounds before the multiplication by the weight. Gemma only rounds the result."""
    x, weight = torch.randn(64, 64).bfloat16(), torch.randn(64).bfloat16()
    z = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    gemma = (z * (1 + weight.double())).bfloat16()
    llama = (z.bfloat16().double() * (1 + weight.double())).bfloat16()
    for out in (
        rms_norm(x, weight),
        reference.rms_norm(x, weight, 1e-6),
    ):
        assert (out != gemma).float().mean() < 0.005  # fp32 and fp64 may round a tie differently
        assert (out != llama).float().mean() > 0.1


def test_the_residual_sum_is_rounded_before_it_is_normalized():
    x, residual = torch.randn(2, 64, 64).bfloat16()
    weight = torch.randn(64).bfloat16()
    out, total = add_rms_norm(x, residual, weight)
    assert torch.equal(total, x + residual)
    assert torch.equal(out, rms_norm(total, weight))


def test_rotation_is_rounded_once():
    x = torch.randn(1, 4, 64, 32).bfloat16()
    angle = torch.randn(1, 1, 64, 16)
    cos, sin = angle.cos(), angle.sin()
    x1, x2 = x.double().chunk(2, dim=-1)
    expected = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
    out = reference.rotate(x, cos, sin)
    assert (out != expected.bfloat16()).float().mean() < 0.005
    rotated = rotate(x.transpose(1, 2), cos[:, 0], sin[:, 0]).transpose(1, 2)
    assert_rounded(rotated, expected, 3, pair_size(expected))


def test_gelu_is_the_tanh_approximation():
    gate_up = torch.tensor([[-2.7, 1.0]])
    gate, up = gate_up.chunk(2, dim=-1)
    for out in (geglu(gate, up), reference.geglu(gate, up)):
        assert (torch.nn.functional.gelu(gate) - out).abs() > 4e-4
        assert_rounded(out, geglu_oracle(gate_up), GEGLU_ROUNDINGS, geglu_size(gate_up))


def test_gelu_in_gemma_1_configs_means_the_tanh_approximation(tmp_path):
    config = CONFIGS["gemma-mqa"]
    hf = random_transformers_model(config)
    hf.config.hidden_act = "gelu"
    hf.save_pretrained(tmp_path)
    ids = torch.arange(3, 40).unsqueeze(0)
    expected = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    model = GemmaForCausalLM.from_pretrained(tmp_path, device="cpu")
    close(model(ids).logits, expected(ids).logits)


def test_angles_are_fp32_in_a_bf16_model():
    """bf16 cannot represent 257, so neighboring positions would be rotated by equal angles."""
    config, dtypes = CONFIGS["gemma3-mqa"], (torch.bfloat16, torch.float32)
    half, full = (KVCache(config, 1, 260, dtype=dtype) for dtype in dtypes)
    for cache in (half, full):
        cache.advance(256)
    position = torch.arange(256, 260).unsqueeze(0)
    for kind in (FULL, SLIDING):
        half_angles, full_angles = (torch.stack(x.angles_of(4)[kind]) for x in (half, full))
        walk = torch.stack(reference.angles(config.rope(kind), config.head_dim, position)).squeeze(
            2
        )
        for angles in (half_angles, walk):  # [2, 1, 4, d / 2]: cos and sin
            assert angles.dtype == torch.float32
            assert torch.equal(angles, full_angles)
            assert len({float(c) for c in angles[0, 0, :, 0]}) == 4


def test_attention_scale_is_query_pre_attn_scalar(twins):
    """Another query_pre_attn_scalar must change logits: the scale must not depend on head_dim."""
    if twins.config.model_type == "gemma":
        pytest.skip("Gemma 1 scales by head_dim")
    other = GemmaForCausalLM.from_pretrained(twins.path, device="cpu")
    ids = twins.prompt(1, 12)
    before = other(ids).logits
    config = replace(twins.config, query_pre_attn_scalar=twins.config.head_dim)
    for module in other.modules():
        if hasattr(module, "config"):
            module.config = config
    assert (other(ids).logits - before).abs().max() > 1e-2
