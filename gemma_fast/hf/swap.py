"""Inserts the kernels into a transformers model, removes them, and reports which code runs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from gemma_fast.hf.attention import PREFIX, Run, logger, register
from gemma_fast.hf.find import UNPACKING, parts_of, text_decoder, whys_not
from gemma_fast.hf.layers import Fast, swap_in, swap_out
from gemma_fast.hf.packed import has_kernels

M = TypeVar("M", bound=nn.Module)


def accelerate(
    model: M,
    *,
    norm: bool = True,
    attention: bool = True,
    mlp: bool = True,
    router: bool = True,
    experts: bool = True,
    linear: bool | None = None,
    strict: bool = False,
) -> M:
    """Runs parts of this model on the kernels. Changes the model in place, and returns it.

    norm, attention, mlp  parts to run on the kernels
    router, experts       parts of a mixture of experts (Gemma 4 26B-A4B)
    linear                linears whose weight compressed-tensors or torchao has quantized. None:
                          on a GPU, and on a CPU if gcc is installed, which compiles the kernels;
                          without kernels, each call would unpack the weight
    strict                raise RuntimeError, with the reason, if the kernels do not support a call

    Modules and attention functions that another library has replaced stay as they are, and so does
    bidirectional attention. `accelerate` logs this once, and `explain` lists it. The modules on the
    kernels run transformers' code in training mode and if gradients are recorded, because the
    kernels have no backward. Attention also does so for dropout, for `output_attentions`, and for
    masks that hide more than causality, a window and left padding; it is then sdpa if the model
    used sdpa before, else eager.

    Raises ValueError, and leaves the model unchanged, for a model without a text decoder of Gemma 1
    to 4, a device other than cuda or cpu, a GPU below compute capability 8.0, and a model of which
    nothing can run on the kernels. Raises RuntimeError if strict=True and a part cannot.
    """
    text = text_decoder(model)
    _check_devices(text)
    if linear is None:
        linear = has_kernels(next(text.parameters()))
    wanted = {
        "norm": norm, "mlp": mlp, "attention": attention, "router": router, "experts": experts,
        "linear": linear,
    }  # fmt: skip
    parts = parts_of(model, text)
    whys = whys_not(model, text)
    left = {name: whys[x] for name, x, part in parts if wanted[part] and x in whys}
    chosen = [(x, part) for name, x, part in parts if wanted[part] and name not in left]
    if left and (strict or not chosen):
        _refuse(left, strict)
    restore(model)
    if any(part == "linear" for _, part in chosen):
        _suspend_unpacking(model, text)
    for module, part in chosen:
        swap_in(module, part, strict)
    if any(part == "attention" for _, part in chosen):
        text.config._attn_implementation = register(text.config._attn_implementation)
    if left:
        logger.warning_once(
            f"gemma_fast leaves {len(left)} of {len(parts)} modules as they are: {_reasons(left)}. "
            "gemma_fast.hf.explain(model) lists the modules."
        )
    return model


def _suspend_unpacking(model: nn.Module, text: PreTrainedModel) -> None:
    """Removes the hook with which compressed-tensors unpacks all weights at the first call."""
    for owner in model.modules():
        handle = vars(owner).pop(UNPACKING, None)
        if handle is not None:
            hook = owner._forward_pre_hooks[handle.id]
            handle.remove()
            vars(text)["unpacking"] = owner, hook


def _resume_unpacking(text: PreTrainedModel) -> None:
    owner, hook = vars(text).pop("unpacking", (None, None))
    if owner is not None:
        vars(owner)[UNPACKING] = owner.register_forward_pre_hook(hook)


def _reasons(left: dict[str, str]) -> str:
    return "; ".join(dict.fromkeys(left.values()))


def _refuse(left: dict[str, str], strict: bool) -> None:
    if strict:
        raise RuntimeError(
            f"{', '.join(left)} cannot run on the kernels, which strict=True requires: "
            f"{_reasons(left)}"
        )
    raise ValueError(
        f"no module of this model can run on the kernels: {_reasons(left)}. Run the model without "
        "accelerate"
    )


def restore(model: M) -> M:
    """Removes the kernels, so that the model is as before `accelerate`, and returns the model."""
    text = text_decoder(model)
    owner = vars(text).get("unpacking", (model,))[0]
    for module in (*model.modules(), *owner.modules()):
        swap_out(module)
    _resume_unpacking(text)
    name = str(text.config._attn_implementation)
    if name.startswith(PREFIX):
        text.config._attn_implementation = name.removeprefix(PREFIX)
    return model


@contextmanager
def accelerated(model: M, **options: Any) -> Iterator[M]:
    """Accelerates the model inside `with accelerated(model):`, with the options of `accelerate`.
    Restores the model's previous state at the end of the block."""
    text = text_decoder(model)
    before = [(x, x.part, dict(vars(x))) for x in model.modules() if isinstance(x, Fast)]
    attention = text.config._attn_implementation
    accelerate(model, **options)
    try:
        yield model
    finally:
        restore(model)
        if any(part == "linear" for _, part, _ in before):
            _suspend_unpacking(model, text)
        for module, part, state in before:
            swap_in(module, part, state["strict"])
            vars(module).update({"checked": state["checked"]} if "checked" in state else {})
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
    part: str  # "norm", "mlp", "attention", "router", "experts" or "linear"
    # "triton", "reference" (a CPU: C kernels or PyTorch) or "transformers" (or another library)
    path: str
    why: str


def explain(model: nn.Module, *, strict: bool = False, **inputs: Any) -> list[Line]:
    """Calls the model once. Returns one Line for each norm, MLP, attention, router and experts
    module, and for each linear with a quantized weight, with the code path that ran and the reason.
    The norm inside a router belongs to the router.

    inputs  keyword arguments of the call; default: two tokens under no_grad, as in `generate`
    strict  raise RuntimeError if one of them runs transformers' code

    A model that was compiled with torch.compile runs uncompiled in this call.
    """
    text = text_decoder(model)
    fast = [module for module in model.modules() if isinstance(module, Fast)]
    demands = [module.strict for module in fast]
    parts, whys = parts_of(model, text), whys_not(model, text)
    for module in fast:
        module.run, module.strict = None, False
    try:
        with nullcontext() if inputs else torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model(**inputs or {"input_ids": torch.full((1, 2), 2, device=text.device)})
    finally:
        for module, demand in zip(fast, demands, strict=True):
            module.strict = demand
    lines = [
        Line(name, part, *_run(text, module, part, whys.get(module)))
        for name, module, part in parts
    ]
    left = [f"{line.module}: {line.why}" for line in lines if line.path == "transformers"]
    if strict and left:
        raise RuntimeError(
            "modules are not on the kernels, which strict=True requires: " + "; ".join(left)
        )
    return lines


def _run(text: PreTrainedModel, module: nn.Module, part: str, why: str | None) -> Run:
    """Returns which code the module ran in the last call, and why. `why` is the reason why it
    cannot run on the kernels, or None."""
    if not isinstance(module, Fast):
        option = f"{part}=False"
        if part == "linear" and not has_kernels(next(text.parameters())):
            option = "without gcc, which compiles kernels for this CPU, only with linear=True"
        return Run("transformers", why or f"not accelerated: {option}")
    if module.run is not None and why and module.run.path != "transformers":
        return Run(module.run.path, f"{why} after accelerate: call accelerate(model) again")
    if module.run is not None:
        return module.run
    name = str(text.config._attn_implementation)
    if part == "attention" and not name.startswith(PREFIX):
        return Run(
            "transformers",
            f"the config's attention was set to {name!r}: call accelerate(model) again",
        )
    return Run("transformers", why or "not called")


def _check_devices(text: PreTrainedModel) -> None:
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
