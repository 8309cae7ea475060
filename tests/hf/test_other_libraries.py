"""Checks models whose classes, methods or attention another library has replaced, before or after
gemma_fast.hf is imported. Such modules stay as they are, `explain` says so, and the logits do not
change."""

import copy
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from c_kernels import without_c
from hf_models import FAMILIES, logits, make, padded, prompt, why
from like_liger import LigerMLP, LigerNorm, replace_classes
from tiny_models import close
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gemma_fast.hf import accelerate, explain, restore


def check_attention_only(model):
    """Checks that only attention runs on the kernels, and that the logits stay the same."""
    ids = prompt()
    expected = logits(model, ids)
    accelerate(model)
    with without_c():  # with these norms, Gemma 4's scores are so large that errors grow
        close(logits(model, ids), expected)
    paths = why(model)
    assert paths["attention"][0] == "reference"
    assert paths["norm"][0] == paths["mlp"][0] == "transformers"
    restore(model)
    assert torch.equal(logits(model, ids), expected)
    return paths


@pytest.mark.parametrize("family", FAMILIES)
def test_classes_replaced_after_the_import_stay(family, monkeypatch):
    plain = make(family)
    replace_classes(monkeypatch.setattr)
    model = make(family)
    assert isinstance(model.model.norm, LigerNorm)
    assert (logits(model, prompt()) - logits(plain, prompt())).abs().max() > 1e-3
    paths = check_attention_only(model)
    assert paths["norm"][1].endswith("LigerNorm is not a class of transformers' Gemma 1 to 4")
    accelerate(plain, strict=True)
    assert {path for path, _ in why(plain).values()} == {"reference"}


def test_classes_replaced_before_the_import_stay():
    code = """
import sys, like_liger
like_liger.replace_classes()
assert "gemma_fast.hf" not in sys.modules
from test_other_libraries import FAMILIES, check_attention_only, make
for family in FAMILIES:
    model = make(family)
    assert type(model.model.norm) is like_liger.LigerNorm
    check_attention_only(model)
"""
    path = [*sys.path, str(Path(__file__).parent)]
    start = f"import sys; sys.path[:] = {path!r}"
    run = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("level", ["instance", "class"])
@pytest.mark.parametrize("family", FAMILIES)
def test_methods_that_were_replaced_stay(family, level, monkeypatch):
    model = make(family)
    if level == "class":
        norm, mlp = type(model.model.norm), type(model.model.layers[0].mlp)
        monkeypatch.setattr(norm, "forward", LigerNorm.forward)
        monkeypatch.setattr(norm, "variance_epsilon", 1e-6, raising=False)
        monkeypatch.setattr(mlp, "forward", LigerMLP.forward)
    else:
        _replace_forwards(model)
    paths = check_attention_only(model)
    assert paths["norm"][1].startswith("its forward was replaced by code of ")


def _replace_forwards(model):
    for module in model.modules():
        name = type(module).__name__
        if "RMSNorm" in name:
            module.variance_epsilon = 1e-6
            module.forward = types.MethodType(LigerNorm.forward, module)
        elif name.endswith("MLP"):
            module.forward = types.MethodType(LigerMLP.forward, module)


def test_methods_replaced_after_acceleration_run_and_are_listed():
    model = make("gemma3-gqa")
    other = copy.deepcopy(model)
    _replace_forwards(other)
    _replace_forwards(accelerate(model))
    close(logits(model, prompt()), logits(other, prompt()))
    path, reason = why(model)["mlp"]
    assert path == "transformers" and reason.startswith("its forward was replaced by code of ")


def test_class_that_was_replaced_after_acceleration_is_listed(monkeypatch):
    model, ids = accelerate(make("gemma3-gqa")), prompt()
    kind = sys.modules[type(model).__module__].Gemma3MLP
    monkeypatch.setattr(kind, "forward", LigerMLP.forward)
    path, reason = why(model)["mlp"]
    assert path == "reference" and reason.endswith("after accelerate: call accelerate(model) again")
    expected = logits(restore(model), ids)
    close(logits(accelerate(model), ids), expected)


def test_one_replaced_forward_leaves_the_other_modules_on_the_kernels():
    model, ids = make("gemma3-gqa"), prompt()
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: 2 * type(mlp).forward(mlp, x)
    expected = logits(model, ids)
    accelerate(model)
    close(logits(model, ids), expected)
    left = [line for line in explain(model) if line.path == "transformers"]
    assert [line.module for line in left] == ["model.layers.1.mlp"]
    with pytest.raises(RuntimeError, match=r"model\.layers\.1\.mlp: its forward was replaced"):
        explain(model, strict=True)
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp cannot run .* strict=True requires"):
        accelerate(model, strict=True)


def test_hooks_of_the_package_accelerate_are_refused():
    """They replace the forward of each module of a model on several devices."""
    model = make("gemma3-gqa")
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    classes = list(map(type, model.modules()))
    with pytest.raises(ValueError, match=r"no module .* load the model on one device"):
        accelerate(model)
    assert list(map(type, model.modules())) == classes


class OtherAttention(transformers.models.gemma3.modeling_gemma3.Gemma3Attention):
    """Remote code may compute with the mask, which here must not become `bounds`."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        attention_mask = attention_mask.clone().clamp(min=-9)
        return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)


@pytest.mark.parametrize("where", ["attention", "layer", "decoder"])
def test_attention_stays_if_the_code_around_it_was_replaced(where):
    model, ids = make("gemma3-gqa"), prompt()
    if where == "attention":
        for layer in model.model.layers:
            layer.self_attn.__class__ = OtherAttention
    elif where == "layer":
        model.model.layers[1].__class__ = _with_clamped_mask(type(model.model.layers[1]))
    else:
        model.model.__class__ = type("Other", (type(model.model),), {"forward": _forward})
    expected = logits(model, ids)
    accelerate(model)
    close(logits(model, ids), expected)
    paths = why(model)
    assert paths["attention"][0] == "transformers" and __name__ in paths["attention"][1]
    assert paths["norm"][0] == "reference" and model.config._attn_implementation == "eager"


def _with_clamped_mask(kind):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        mask = attention_mask.clone().clamp(min=-9)
        return kind.forward(self, hidden_states, attention_mask=mask, **kwargs)

    return type("OtherLayer", (kind,), {"forward": forward})


def _forward(self, *args, **kwargs):
    return super(type(self), self).forward(*args, **kwargs)


@pytest.mark.parametrize("name", ["mine", "sdpa"])
def test_registered_attention_stays(name, monkeypatch):
    """A user's attention function must not be replaced by the kernels, nor by eager attention."""
    functions = transformers.AttentionInterface._global_mapping
    masks = transformers.AttentionMaskInterface._global_mapping

    def mine(*args, **kwargs):
        out, weights = sdpa_attention_forward(*args, **kwargs)
        return 1.5 * out, weights

    monkeypatch.setitem(functions, name, mine)
    monkeypatch.setitem(masks, name, sdpa_mask)
    model, ids = make("gemma3-gqa", name), prompt()
    mask = padded(ids, 7, 0)
    expected = logits(model, ids, mask)
    accelerate(model)
    close(logits(model, ids, mask), expected)
    assert model.config._attn_implementation == name
    path, reason = why(model)["attention"]
    assert path == "transformers" and f"attention is '{name}'" in reason


class Linear4bit(nn.Linear):
    """Stores rounded weights in a tensor of another dtype and shape, as quantization does."""

    def __init__(self, linear):
        super().__init__(1, 1, bias=False)
        self.shape, self.scale = linear.weight.shape, linear.weight.abs().max() / 7
        rounded = (linear.weight / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(rounded.view(-1, 1), requires_grad=False)

    def forward(self, x):
        return x @ (self.weight.view(self.shape) * self.scale).T


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_linears_stay_in_place(family):
    model, ids = make(family), prompt()
    for module in list(model.model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Linear4bit(child))
    expected = logits(model, ids)
    close(logits(accelerate(model), ids), expected)
    assert type(model.model.layers[0].mlp.gate_proj) is Linear4bit
    paths = why(model)
    if "router" in paths:
        reason = f"its proj is a {__name__}.Linear4bit, not a plain torch.nn.Linear"
        assert paths.pop("router") == ("transformers", reason)
    assert {path for path, _ in paths.values()} == {"reference"}
