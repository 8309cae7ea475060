"""Checks that `explain` lists the code that each module runs, and that strict=True raises if a
module does not run on the kernels. Also checks that `accelerate` refuses unsupported models."""

import logging

import pytest
import torch
import transformers
from hf_models import FAMILIES, logits, make, prompt, why

from gemma_fast.hf import accelerate, explain
from gemma_fast.hf import attention as hf_attention

RIGHT = torch.tensor([[1] * 20 + [0] * 10, [1] * 30])  # a mask with padding on the right


@pytest.fixture(params=FAMILIES)
def model(request):
    return make(request.param)


def test_fallback_is_logged_once(model, caplog, monkeypatch):
    logger = hf_attention.logger
    logger.warning_once.cache_clear()
    monkeypatch.setattr(logger, "propagate", True)
    for parent in ("transformers", "gemma_fast"):
        monkeypatch.setattr(logging.getLogger(parent), "propagate", True)
    ids = prompt()
    accelerate(model)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            logits(model, ids, RIGHT)
    said = [r.getMessage() for r in caplog.records if "code for attention" in r.getMessage()]
    assert len(said) == 1 and "explain(model" in said[0]


def test_explain_gives_path_and_reason_of_each_module(model):
    accelerate(model, mlp=False)
    lines = explain(model)
    layers = model.config.num_hidden_layers
    names = dict(model.named_modules())
    assert all(line.module in names for line in lines)
    assert sum(line.part == "attention" for line in lines) == layers
    norms = {line.module for line in lines if line.part == "norm"}
    assert norms == {
        name
        for name, module in names.items()
        if "RMSNorm" in type(module).__name__ and not name.endswith("router.norm")
    }
    reasons = {(line.part, line.path, line.why) for line in lines}
    assert ("mlp", "transformers", "not accelerated: mlp=False") in reasons
    assert ("norm", "reference", "Triton does not run on cpu") in reasons
    with pytest.raises(
        RuntimeError, match=r"strict=True.*layers\.0\.mlp: not accelerated: mlp=False"
    ):
        explain(model, strict=True)


def test_explain_works_on_strict_models_and_detects_replaced_attention(model):
    accelerate(model, strict=True)
    assert all(path == "transformers" for path, _ in why(model, input_ids=prompt()).values())
    with pytest.raises(RuntimeError, match="strict=True requires"):
        model(prompt())
    model.set_attn_implementation("eager")
    path, reason = why(model)["attention"]
    assert path == "transformers" and reason.endswith("call accelerate(model) again")
    with pytest.raises(RuntimeError, match=r"call accelerate\(model\) again"):
        explain(model, strict=True)
    explain(accelerate(model), strict=True)


def test_explain_accepts_a_compiled_model(model):
    accelerate(model).forward = torch.compile(model.forward, backend="eager")
    assert {path for path, _ in why(model).values()} == {"reference"}


def test_explain_lists_modules_that_are_not_called(model):
    accelerate(model)
    explain(model)
    model.model.norm.forward, norm = None, model.model.norm
    del norm.forward
    model.model.norm = torch.nn.Identity()
    model.model.left_over = norm
    line = next(line for line in explain(model) if line.module.endswith("left_over"))
    assert (line.path, line.why) == ("transformers", "not called")


def test_model_that_shares_the_config_is_not_accelerated(model):
    """Only the model that was passed to `accelerate` runs on the kernels."""
    ids, twin = prompt(), type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    expected = logits(twin, ids, RIGHT), logits(twin, ids)
    accelerate(model)
    assert torch.equal(logits(twin, ids, RIGHT), expected[0])
    assert torch.equal(logits(twin, ids), expected[1])
    assert why(twin)["attention"] == ("transformers", "not accelerated: attention=False")
    assert {path for path, _ in why(model).values()} == {"reference"}


@pytest.mark.parametrize("part", ["norm", "mlp"])
def test_strict_raises_if_gradients_are_recorded(model, part):
    accelerate(model, attention=False, strict=True, **{"norm" if part == "mlp" else "mlp": False})
    with pytest.raises(RuntimeError, match=f"{part} cannot run on the kernels.*no_grad"):
        model(prompt())


def test_other_architectures_are_refused():
    config = transformers.LlamaConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, num_key_value_heads=1,
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config)
    for call in (accelerate, explain):
        with pytest.raises(
            ValueError,
            match="modeling_llama.LlamaForCausalLM cannot be accelerated: model_type 'llama', but "
            r"only .* Gemma 1 to 4 can .*\. Run this model without accelerate",
        ):
            call(llama)


def test_model_on_an_unsupported_device_is_refused_and_unchanged(model):
    model = model.to("meta")
    classes = list(map(type, model.modules()))
    with pytest.raises(ValueError, match="the model is on meta: move it to cuda"):
        accelerate(model)
    assert list(map(type, model.modules())) == classes
    assert model.config._attn_implementation == "eager"


def test_old_or_missing_transformers_raises_import_error():
    import subprocess
    import sys

    code = "import transformers; transformers.__version__ = '5.3.1'; import gemma_fast.hf"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "ImportError: gemma_fast.hf supports transformers from 5.17 to below 6" in run.stderr
    assert "but found 5.3.1: pip install 'gemma_fast[hf]'" in run.stderr
    code = "import sys; sys.modules['transformers'] = None; import gemma_fast.hf"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "gemma_fast.hf needs transformers, which is not installed: pip install" in run.stderr
