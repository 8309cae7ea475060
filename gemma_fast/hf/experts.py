"""Decides whether the kernels can run a router, or the experts, of a transformers model.

Experts are one module per layer, with the weights of all experts in two tensors, as transformers'
experts implementations ("eager", "grouped_mm", …) read them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gemma_fast.hf.packed import is_quantized


def why_not_router(module: Any, dtype: torch.dtype | None = None) -> str | None:
    """Returns why the router's norm and projection must be called, or None if the kernel gives the
    same result. dtype: that of the router's input, or None if there is no input yet."""
    proj = module.proj
    if type(proj) is not nn.Linear or is_quantized(proj) or "forward" in vars(proj):
        kind = f"{type(proj).__module__}.{type(proj).__qualname__}"
        return f"its proj is a {kind}, not a plain torch.nn.Linear"
    weight = proj.weight
    if type(weight) is not nn.Parameter or not weight.is_contiguous() or proj.bias is not None:
        return f"its proj has a bias, or a {type(weight).__name__} that is not plain and contiguous"
    if has_hooks(proj) or has_hooks(module.norm):
        return "its proj or norm has hooks, and the kernel does not call these modules"
    if dtype not in (None, weight.dtype):
        return f"its proj is {weight.dtype}, but x is {dtype}"
    return None


def why_not_experts(module: Any) -> str | None:
    """Returns why the kernels cannot read the weights of these experts, or None if they can."""
    for name in ("gate_up_proj", "down_proj"):
        weight = module._parameters[name]
        if type(weight) is not nn.Parameter:
            return f"its {name} is a {type(weight).__name__}, not a plain tensor"
        if not weight.is_contiguous():
            return f"its {name} is not contiguous"
    own, count = module.num_experts, module.config.num_experts
    if own != count or getattr(module, "_is_expert_parallel", False):
        return f"it has {own} of {count} experts, as in expert parallelism"
    return None


def has_hooks(module: Any) -> bool:
    """Returns True if a call of this module, or activation function, also calls a hook."""
    return bool(
        getattr(module, "_forward_hooks", None) or getattr(module, "_forward_pre_hooks", None)
    )
