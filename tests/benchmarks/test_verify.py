"""Tests that `gemma-fast verify` passes correct kernels and models, and fails wrong ones."""

import pytest
import torch
from c_kernels import without_c
from certificate_lines import BF16, CPU, FP16, FP32, exact_gelu, failed, kernels, model_lines
from marks import slow
from triton_interpreter import interpreter

from gemma_fast.benchmarks.kernels.rivals import plain
from gemma_fast.benchmarks.verify import kernels as verify_kernels
from gemma_fast.benchmarks.verify import model as verify_model
from gemma_fast.benchmarks.verify.kernels import CHECKS, check_kernels, spacing, value_ulps
from gemma_fast.benchmarks.verify.margins import INTERPRETER
from gemma_fast.kernels import attention as attention_file
from gemma_fast.kernels import decode_attention as decode_file
from gemma_fast.kernels import geglu as geglu_file
from gemma_fast.kernels import lm_head as lm_head_file
from gemma_fast.kernels import rmsnorm as rmsnorm_file


def test_ulp_is_the_spacing_at_the_value_or_at_the_rms_if_that_is_larger():
    size = torch.tensor([1.0, 1.9, 2.0, 0.75], dtype=torch.float64)
    assert spacing(size, BF16).tolist() == [2**-7, 2**-7, 2**-6, 2**-8]
    exact = torch.tensor([1.0, -1.0, 0.0, 1.0], dtype=torch.float64)  # RMS 0.87
    found = exact + torch.tensor([2**-7, 0, 2**-8, 2**-6])
    assert value_ulps(found.bfloat16(), exact, BF16).tolist() == [1, 0, 1, 2]


@pytest.mark.slow
def test_kernels_pass_verify_in_the_interpreter():
    with interpreter():
        lines = list(check_kernels(CPU, [FP32, FP16], INTERPRETER))
    assert len(lines) == 2 * len(CHECKS)
    assert not failed(lines)


def test_references_pass_and_their_attention_beats_eager_in_bf16():
    lines = kernels(FP32, BF16)
    assert not failed(lines.values())
    for (check, dtype), found in lines.items():
        if dtype == "bfloat16" and "attention" in check:
            rms = found.figures[1]
            assert rms.ours < 0.5 < rms.eager, "eager attention must round scores and weights"


def rounded_weight(x, weight, eps=1e-6, offset=1.0):
    z = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (z * (offset + weight)).to(x.dtype)


def always_1_plus(reference):
    return lambda x, weight, eps=1e-6, offset=1.0: reference(x, weight, eps)


def without_v_norm(reference):
    return lambda *args: reference(*args[:10])


def one_key_more(reference):
    def wrong(*args, window=None, **options):
        return reference(*args, window=window and window + 1, **options)

    return wrong


MISTAKES = {
    "exact GELU": (geglu_file, "geglu_reference", lambda _: exact_gelu, {FP32: "geglu"}),
    "1 + weight rounded": (rmsnorm_file, "rms_norm_reference", lambda _: rounded_weight,
                           {BF16: "rms_norm"}),
    "1 + weight in Gemma 4": (rmsnorm_file, "rms_norm_reference", always_1_plus,
                              {FP32: "add_rms_norm, layer scalar"}),
    "values are not normalized": (decode_file, "rotary_write_reference", without_v_norm,
                                  {FP32: "decode_attention, K = V"}),
    "window off by one": (attention_file, "attention_reference", one_key_more,
                          {FP32: "attention, window, cap, norm",
                           BF16: "attention, window, cap, norm"}),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_kernel_with_a_mistake_fails(mistake, monkeypatch):
    module, name, wrong, expected = MISTAKES[mistake]
    monkeypatch.setattr(module, name, wrong(getattr(module, name)))
    for dtype, check in expected.items():
        with without_c():  # so that the references run
            wrong = {x.check: x for x in kernels(dtype).values() if not x.ok}
        assert check in wrong and not wrong[check].note, "the figures must show the mistake"


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("wrong", ["scaled", "another dtype", "another shape", "NaN", "raises"])
def test_every_kernel_check_detects_wrong_outputs_and_errors(wrong, dtype, monkeypatch, capsys):
    change = {
        "scaled": lambda x: x * 1.02, "another dtype": lambda x: x.double(),
        "another shape": lambda x: x[..., :-1], "NaN": lambda x: x * torch.nan,
        "raises": lambda x: 1 / 0,
    }  # fmt: skip

    def spoiled(ours):
        def call(*given):
            out = ours(*given)()
            return tuple(map(change[wrong], [out] if isinstance(out, torch.Tensor) else out))

        return plain(call)

    checks = [check._replace(ours=spoiled(check.ours)) for check in CHECKS if not check.chooses]
    monkeypatch.setattr(verify_kernels, "CHECKS", checks)
    assert len(failed(kernels(dtype).values())) == len(checks) == len(CHECKS) - 2


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_wrong_token_fails(dtype, monkeypatch):
    def wrong(*args, **options):
        args[6].fill_(0)

    monkeypatch.setattr(lm_head_file, "next_token", wrong)
    assert failed(kernels(dtype).values()) == {"next_token, 8 rows", "next_token, 16 rows"}
    # The token stays -1 if next_token writes none.
    monkeypatch.setattr(lm_head_file, "next_token", lambda *_, **__: None)
    assert failed(kernels(dtype).values()) == {"next_token, 8 rows", "next_token, 16 rows"}


@pytest.mark.parametrize(
    "name",
    ["gemma2-gqa", "gemma3-gqa", "gemma4-all", *slow("gemma-mqa", "gemma-mha", "gemma3-mqa")],
)
def test_correct_models_pass(name):
    lines = model_lines(name, (FP32, BF16))
    assert not failed(lines.values())
    assert len(lines) == 2 * len(verify_model.LINES)
    greedy = lines["24 greedy tokens: until they differ / gap float32"].figures[0]
    assert (greedy.ours, greedy.eager) == (24, 24), "in float32 all tokens must be the truth's"
