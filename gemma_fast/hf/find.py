"""Finds the text decoder of a transformers model, and decides which of its norms, MLPs and
attention modules the kernels can replace.

Modules are recognized by their structure, and code by the module that defines it. Classes are never
compared with imported ones, because other libraries (Liger, unsloth, kernels) replace transformers'
classes, methods and registered attention functions, before or after this package is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo import OptimizedModule
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gemma_fast.hf.attention import PREFIX
from gemma_fast.hf.layers import NORM_OFFSETS, original_class

# Model types of the configs.
DECODERS = ("gemma", "gemma2", "gemma3_text", "gemma4_text", "gemma4_unified_text")
ATTENTIONS = (
    "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3",
    "flash_attention_4",
)  # fmt: skip
WRAPPERS = (OptimizedModule, nn.DataParallel, nn.parallel.DistributedDataParallel)


def text_decoder(model: nn.Module) -> PreTrainedModel:
    """Returns the Gemma decoder inside this model: the model itself, or one of its submodules.
    Raises ValueError if the model contains no such decoder, or several."""
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if isinstance(model, WRAPPERS):
        raise ValueError(f"{kind} cannot be accelerated: call accelerate before it wraps the model")
    found = {name: x for name, x in model.named_modules() if _is_decoder(x)}
    if len(found) > 1:
        raise ValueError(
            f"{kind} cannot be accelerated: it contains {len(found)} Gemma decoders. Call "
            f"accelerate with one of them: {', '.join(found)}"
        )
    if not found:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        raise ValueError(
            f"{kind} cannot be accelerated: model_type {model_type!r}, but only models that contain"
            " a text decoder of Gemma 1 to 4 can (GemmaModel, Gemma2Model, Gemma3TextModel, "
            "Gemma4TextModel, Gemma4UnifiedTextModel, with any head). Run this model without "
            "accelerate"
        )
    return next(iter(found.values()))


def _is_decoder(module: nn.Module) -> bool:
    return (
        isinstance(module, PreTrainedModel)
        and module.config.model_type in DECODERS
        and module._modules.keys() >= {"embed_tokens", "layers", "norm"}
    )


def part_of(module: nn.Module) -> str | None:
    """Returns "norm", "mlp", "attention" or "experts" for such a module of any library; else None.
    A wrapper (PEFT, torch.compile) is not a part; the module inside it is."""
    children = module._modules.keys()
    if children >= {"q_proj", "o_proj"}:  # some layers of Gemma 4 have no k_proj, or no v_proj
        return "attention"
    if children >= {"gate_proj", "up_proj", "down_proj"}:
        return "mlp"
    if "norm" in type(module).__name__.lower() and (
        "weight" in module._parameters or getattr(module, "with_scale", True) is False
    ):
        return "norm"
    if module._parameters.keys() >= {"gate_up_proj", "down_proj"}:
        return "experts"
    return None


def why_not(module: nn.Module) -> str | None:
    """Returns why this part can never run on the kernels, or None if it can."""
    kind, part = original_class(type(module)), part_of(module)
    if part == "experts":
        return "experts are not replaced: the kernels have no mixture of experts"
    if kind.__module__ not in NORM_OFFSETS:
        return f"{kind.__module__}.{kind.__qualname__} is not a class of transformers' Gemma 1 to 4"
    if hasattr(module, "_hf_hook"):
        return (
            "the package accelerate has replaced its forward, as it does for a model on several "
            "devices: load the model on one device"
        )
    for name in ("forward", "_norm"):
        code = _foreign_code(getattr(kind, name, None))
        if name in vars(module):
            code = getattr(vars(module)[name], "__module__", None) or "another library"
        if code:
            return f"its {name} was replaced by code of {code}"
    weight = module._parameters.get("weight")
    if part == "norm" and type(weight) not in (nn.Parameter, type(None)):
        return f"its weight is a {type(weight).__name__}, not a plain tensor"
    if part == "mlp" and not _is_tanh_gelu(module.act_fn):
        return f"its activation is {module.act_fn}, not the GELU's tanh approximation"
    return None


def why_not_attention(text: PreTrainedModel) -> str | None:
    """Returns why no attention module of this decoder can run on the kernels, or None if all can.
    They share one mask, so all of them run on the kernels, or none."""
    name = str(text.config._attn_implementation).removeprefix(PREFIX)
    if name not in ATTENTIONS or _replaced(name):
        return (
            f"the model's attention is {name!r}, which is not transformers' own: call "
            "model.set_attn_implementation('sdpa') before accelerate"
        )
    layers = [x for x in text.modules() if x._modules.keys() >= {"self_attn", "mlp"}]
    for module in (text, *layers):
        if code := _foreign_code(type(module).forward):
            return f"the forward of {type(module).__qualname__} comes from {code}"
    attentions = [x for x in text.modules() if part_of(x) == "attention"]
    for module in attentions:
        if why := why_not(module):
            return why
        eager = sys.modules[original_class(type(module)).__module__].eager_attention_forward
        if name == "eager" and (code := _foreign_code(eager)):
            return f"eager_attention_forward comes from {code}"
    if not len(layers) == len(attentions) >= len(list(text.layers.children())):  # type: ignore[union-attr]
        return "a layer's attention is not a module with q_proj and o_proj"
    config: Any = text.config
    if not getattr(config, "is_causal", True) or not all(x.is_causal for x in attentions):
        return "attention is bidirectional (is_causal is False), and the kernels are causal"
    return None


def _replaced(name: str) -> bool:
    functions = ALL_ATTENTION_FUNCTIONS.get(name), ALL_MASK_ATTENTION_FUNCTIONS.get(name)
    return any(_foreign_code(function) is not None for function in functions)


def _foreign_code(function: Callable[..., Any] | None) -> str | None:
    """Returns the name of the module, outside of transformers, that defines this function or one
    that it wraps. functools.wraps copies `__module__`, but not `__globals__`."""
    while function is not None:
        home = getattr(function, "__globals__", {}).get("__name__", "another library")
        if not home.startswith("transformers."):
            return str(home)
        function = getattr(function, "__wrapped__", None)
    return None


def _is_tanh_gelu(activation: Any) -> bool:
    x = torch.linspace(-4, 4, 33)
    return torch.allclose(activation(x), F.gelu(x, approximate="tanh"), rtol=0, atol=1e-5)
