"""Finds the text decoder of a transformers model, and decides which of its norms, MLPs, routers,
experts and attention modules the kernels can replace. Also the quantized linears of the whole
model.

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
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gemma_fast.hf.attention import PREFIX
from gemma_fast.hf.experts import why_not_experts, why_not_router
from gemma_fast.hf.layers import NORM_OFFSETS, Fast, original_class
from gemma_fast.hf.packed import has_scheme, is_quantized, why_not_packed

# Model types of the configs.
DECODERS = ("gemma", "gemma2", "gemma3_text", "gemma4_text", "gemma4_unified_text")
ATTENTIONS = (
    "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3",
    "flash_attention_4",
)  # fmt: skip
UNPACKING = "ct_decompress_hook"  # attribute of a model whose weights compressed-tensors unpacks
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


def parts_of(model: nn.Module, text: PreTrainedModel) -> list[tuple[str, nn.Module, str]]:
    """Returns name, module and part of the text decoder's parts, and of all quantized linears. The
    norm of a router belongs to the router."""
    routers = [x for x in text.modules() if part_of(x) == "router"]
    of_text = set(text.modules()) - {x.norm for x in routers}  # type: ignore[arg-type]
    return [
        (name, module, part)
        for name, module in model.named_modules()
        if (part := part_of(module)) and (module in of_text or part == "linear")
    ]


def whys_not(model: nn.Module, text: PreTrainedModel) -> dict[nn.Module, str]:
    """Returns part → the reason why it cannot run on the kernels, for parts that cannot."""
    attention = why_not_attention(text)
    parts = parts_of(model, text)
    found = {x: attention if part == "attention" else why_not(x) for _, x, part in parts}
    whys = {module: why for module, why in found.items() if why}
    linears = {x for _, x, part in parts if part == "linear" and not isinstance(x, Fast)}
    return _unpacked_together(model, linears, whys) | whys


def _unpacked_together(
    model: nn.Module, linears: set[nn.Module], whys: dict[nn.Module, str]
) -> dict[nn.Module, str]:
    """Returns linear → the reason why it cannot run on the kernels, if that is another module:
    compressed-tensors unpacks all weights at the first call, or none."""
    names = {module: name for name, module in model.named_modules()}
    together: dict[nn.Module, str] = {}
    for owner in (x for x in names if UNPACKING in vars(x)):
        quantized = [x for x in owner.modules() if has_scheme(x)]
        first = next((x for x in quantized if x not in linears or x in whys), None)
        why = "compressed-tensors unpacks all weights at the first call"
        if first is not None:
            why += f", because of {names[first]}: {whys.get(first, 'it is not a linear')}"
        together |= dict.fromkeys(quantized, "" if first is None else why)
    why = (
        "compressed-tensors unpacks it at the first call of the whole model: accelerate that model"
    )
    alone = {x: why for x in linears - together.keys() if has_scheme(x)}
    return {module: why for module, why in (together | alone).items() if why}


def part_of(module: nn.Module) -> str | None:
    """Returns "norm", "mlp", "attention", "router" or "experts" for such a module of any library,
    and "linear" for a linear with a quantized weight; else None. A wrapper (PEFT, torch.compile) is
    not a part; the module inside it is."""
    if isinstance(module, Fast):
        return module.part
    if is_quantized(module):
        return "linear"
    children = module._modules.keys()
    if children >= {"q_proj", "o_proj"}:  # some layers of Gemma 4 have no k_proj, or no v_proj
        return "attention"
    if children >= {"gate_proj", "up_proj", "down_proj"}:
        return "mlp"
    if "norm" in type(module).__name__.lower() and (
        "weight" in module._parameters or getattr(module, "with_scale", True) is False
    ):
        return "norm"
    weights = module._parameters.keys()
    if weights >= {"gate_up_proj", "down_proj"}:
        return "experts"
    if weights >= {"scale", "per_expert_scale"} and children >= {"norm", "proj"}:
        return "router"
    return None


def why_not(module: nn.Module) -> str | None:
    """Returns why this part can never run on the kernels, or None if it can."""
    kind, part = original_class(type(module)), part_of(module)
    if part != "linear" and kind.__module__ not in NORM_OFFSETS:
        return f"{kind.__module__}.{kind.__qualname__} is not a class of transformers' Gemma 1 to 4"
    if hasattr(module, "_hf_hook"):
        return (
            "the package accelerate has replaced its forward, as it does for a model on several "
            "devices: load the model on one device"
        )
    for name in ("forward", "_norm"):
        code = None if part == "linear" else _foreign_code(getattr(kind, name, None))
        own = vars(module).get(name)
        if own is not None and not _calls_the_class(own):
            code = getattr(own, "__module__", None) or "another library"
        if code:
            return f"its {name} was replaced by code of {code}"
    weight = module._parameters.get("weight")
    if part == "norm" and type(weight) not in (nn.Parameter, type(None)):
        return f"its weight is a {type(weight).__name__}, not a plain tensor"
    if part in ("mlp", "experts") and not _is_tanh_gelu(module.act_fn):
        return f"its activation is {module.act_fn}, not the GELU's tanh approximation"
    if part == "router":
        return why_not(module.norm) or why_not_router(module)  # type: ignore[arg-type]
    if part == "experts":
        chosen: Any = module.config._experts_implementation  # type: ignore[union-attr]
        if code := _foreign_code(ALL_EXPERTS_FUNCTIONS.get(chosen)):
            return f"the model's experts implementation {chosen!r} comes from {code}"
        return why_not_experts(module)
    if part == "linear" and not isinstance(module, Fast):
        return why_not_packed(module)  # type: ignore[arg-type]
    return None


def _calls_the_class(forward: Any) -> bool:
    """Returns True for a forward that compressed-tensors has set on a module. It calls the class's
    forward, and quantizes activations if the module's scheme says so."""
    home = getattr(forward, "__globals__", {}).get("__name__", "")
    return str(home).partition(".")[0] == "compressed_tensors"


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
