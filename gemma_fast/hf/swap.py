"""Inserts the kernels into a transformers model, removes them, and reports which code runs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    GemmaForCausalLM,
    PreTrainedModel,
)

from gemma_fast.hf.attention import PREFIX, Run, register
from gemma_fast.hf.layers import FAST, ORIGINAL, Fast, why_not

M = TypeVar("M", bound=nn.Module)


def accelerate(
    model: M, *, norm: bool = True, attention: bool = True, mlp: bool = True, strict: bool = False
) -> M:
    """Runs parts of this model on the kernels. Changes the model in place, and returns it.

    norm, attention, mlp  parts to run on the kernels
    strict                raise RuntimeError, with the reason, if the kernels do not support a call

    transformers' code runs in training mode and if gradients are recorded, because the kernels have
    no backward. It also runs for dropout, for `output_attentions`, and for masks that hide more
    than causality, a window and left padding. Attention is then sdpa if the model used sdpa before,
    else eager.

    Raises ValueError, and leaves the model unchanged, for an architecture other than Gemma 1 to 3,
    a device other than cuda or cpu, a GPU below compute capability 8.0, and modules whose forward
    another library has replaced.
    """
    text = _text_model(model)
    _refuse(text)
    restore(model)
    wanted = {"norm": norm, "mlp": mlp, "attention": attention}
    parts = [(module, _part(module)) for module in text.modules()]
    for module in [x for x, part in parts if part and wanted[part] and not why_not(x)]:
        module.__class__ = FAST[type(module)]
        module.strict = strict  # type: ignore[assignment]
    if attention:
        text.config._attn_implementation = register(text.config._attn_implementation)
    return model


def restore(model: M) -> M:
    """Removes the kernels, so that the model is as before `accelerate`, and returns the model."""
    text = _text_model(model)
    for module in text.modules():
        if isinstance(module, Fast):
            module.__class__ = ORIGINAL[type(module)]  # type: ignore[assignment]
            for attribute in ("strict", "run"):
                module.__dict__.pop(attribute, None)
    name = str(text.config._attn_implementation)
    if name.startswith(PREFIX):
        text.config._attn_implementation = name.removeprefix(PREFIX)
    return model


@contextmanager
def accelerated(model: M, **options: bool) -> Iterator[M]:
    """Accelerates the model inside `with accelerated(model):`, with the options of `accelerate`.
    Restores the model's previous state at the end of the block."""
    text = _text_model(model)
    before = [(module, type(module), vars(module).get("strict")) for module in text.modules()]
    attention = text.config._attn_implementation
    accelerate(model, **options)
    try:
        yield model
    finally:
        restore(model)
        for module, kind, strict in before:
            if issubclass(kind, Fast):
                module.__class__, module.strict = kind, strict  # type: ignore[assignment]
        text.config._attn_implementation = attention


class FastGemma:
    """`FastGemma.from_pretrained(…)` takes the arguments of `AutoModelForCausalLM.from_pretrained`,
    and returns the same model, accelerated."""

    @staticmethod
    @functools.wraps(AutoModelForCausalLM.from_pretrained)
    def from_pretrained(*args: Any, **kwargs: Any) -> PreTrainedModel:
        return accelerate(AutoModelForCausalLM.from_pretrained(*args, **kwargs))


class Line(NamedTuple):
    module: str  # "model.layers.0.mlp"
    part: str  # "norm", "mlp" or "attention"
    path: str  # "triton", "reference" (the kernel's PyTorch reference) or "transformers"
    why: str


def explain(model: nn.Module, *, strict: bool = False, **inputs: Any) -> list[Line]:
    """Calls the model once. Returns one Line for each norm, MLP and attention module, with the code
    path that ran and the reason.

    inputs  keyword arguments of the call; default: two tokens under no_grad, as in `generate`
    strict  raise RuntimeError if a module runs transformers' code

    A model that was compiled with torch.compile runs uncompiled in this call.
    """
    text = _text_model(model)
    fast = [module for module in text.modules() if isinstance(module, Fast)]
    demands = [module.strict for module in fast]
    for module in fast:
        module.run, module.strict = None, False
    try:
        with nullcontext() if inputs else torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model(**inputs or {"input_ids": torch.full((1, 2), 2, device=text.device)})
    finally:
        for module, demand in zip(fast, demands, strict=True):
            module.strict = demand
    of_text = set(text.modules())
    lines = [
        Line(name, part, *_run(module, part))
        for name, module in model.named_modules()
        if (part := _part(module)) and module in of_text
    ]
    left = [f"{line.module}: {line.why}" for line in lines if line.path == "transformers"]
    if strict and left:
        raise RuntimeError(
            "modules are not on the kernels, which strict=True requires: " + "; ".join(left)
        )
    return lines


def _run(module: nn.Module, part: str) -> Run:
    """Returns which code the module ran in the last call, and why."""
    if not isinstance(module, Fast):
        return Run("transformers", why_not(module) or f"not accelerated: {part}=False")
    if module.run is not None:
        return module.run
    config: Any = getattr(module, "config", None)
    if part == "attention" and not config._attn_implementation.startswith(PREFIX):
        name = config._attn_implementation
        return Run(
            "transformers",
            f"the config's attention was set to {name!r}: call accelerate(model) again",
        )
    return Run("transformers", "not called")


def _part(module: nn.Module) -> str | None:
    """Returns "norm", "mlp" or "attention" for such a module, accelerated or not; else None."""
    for original, fast in FAST.items():
        if isinstance(module, original):
            return fast.part
    return None


def _text_model(model: nn.Module) -> PreTrainedModel:
    """Returns the text decoder, which contains the norms, MLPs and attention modules. Raises
    ValueError for a model that cannot be accelerated."""
    inner: Any = model
    if hasattr(inner, "get_base_model"):  # PEFT models
        inner = inner.get_base_model()
    if isinstance(inner, (GemmaForCausalLM, Gemma2ForCausalLM, Gemma3ForCausalLM)):
        return inner.model
    if isinstance(inner, Gemma3ForConditionalGeneration):
        return inner.model.language_model
    kind = type(inner)
    raise ValueError(
        f"{kind.__module__}.{kind.__name__} cannot be accelerated: only transformers' "
        "GemmaForCausalLM, Gemma2ForCausalLM, Gemma3ForCausalLM, and the text part of "
        "Gemma3ForConditionalGeneration can, before torch.compile or DataParallel wraps them"
    )


def _refuse(text: PreTrainedModel) -> None:
    for device in {weight.device for weight in text.parameters()}:
        if device.type not in ("cuda", "cpu"):
            raise ValueError(
                f"the model is on {device}: move it to cuda, or to cpu for the kernels' references"
            )
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            found = ".".join(map(str, torch.cuda.get_device_capability(device)))
            raise ValueError(
                f"{device} has compute capability {found}, but the kernels need 8.0 or higher"
            )
    for name, module in text.named_modules():
        if _part(module) and "forward" in module.__dict__:
            raise ValueError(
                f"another library has replaced the forward of {name} (the package accelerate does "
                "this for a model on several devices): load the model on one device"
            )
