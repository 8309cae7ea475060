"""Subclasses transformers' Gemma layers, with a forward on the kernels.

`accelerate` sets the class of a module to the subclass. The module keeps its parameters and calls
the same submodules, so adapters and hooks on the submodules still work.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaAttention, GemmaMLP, GemmaRMSNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2MLP, Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention, Gemma3MLP, Gemma3RMSNorm

from gemma_fast.hf.attention import RING_ERROR, Run, falls_back, is_bounds, reason
from gemma_fast.hf.cache import GemmaFastCache, Ring
from gemma_fast.kernels.geglu import geglu
from gemma_fast.kernels.rmsnorm import rms_norm


class Fast(nn.Module):
    part: ClassVar[str]
    strict: bool = False
    run: Run | None = None  # code path of the last call that was not compiled


class FastNorm(Fast):
    part = "norm"
    weight: nn.Parameter
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        if falls_back(self, self.part, x, reason(self, x)):
            return super().forward(x)
        return rms_norm(x, self.weight, self.eps)


class FastMLP(Fast):
    part = "mlp"
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        if falls_back(self, self.part, x, reason(self, x)):
            return super().forward(x)
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


class FastAttention(Fast):
    """Runs transformers' forward, which calls `attention.attend` by its name in the config."""

    part = "attention"
    layer_idx: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # transformers 5.24 renamed `past_key_values` to `cache`.
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        mask = kwargs.get("attention_mask")
        rings = isinstance(cache, GemmaFastCache) and isinstance(cache.layers[self.layer_idx], Ring)
        if rings and not is_bounds(mask):  # a mask from the caller; rings do not support it
            raise ValueError(RING_ERROR)
        return super().forward(*args, **kwargs)


class FastGemmaRMSNorm(FastNorm, GemmaRMSNorm): ...


class FastGemma2RMSNorm(FastNorm, Gemma2RMSNorm): ...


class FastGemma3RMSNorm(FastNorm, Gemma3RMSNorm): ...


class FastGemmaMLP(FastMLP, GemmaMLP): ...


class FastGemma2MLP(FastMLP, Gemma2MLP): ...


class FastGemma3MLP(FastMLP, Gemma3MLP): ...


class FastGemmaAttention(FastAttention, GemmaAttention): ...


class FastGemma2Attention(FastAttention, Gemma2Attention): ...


class FastGemma3Attention(FastAttention, Gemma3Attention): ...


FAST: dict[type[nn.Module], type[Fast]] = {
    GemmaRMSNorm: FastGemmaRMSNorm,
    Gemma2RMSNorm: FastGemma2RMSNorm,
    Gemma3RMSNorm: FastGemma3RMSNorm,
    GemmaMLP: FastGemmaMLP,
    Gemma2MLP: FastGemma2MLP,
    Gemma3MLP: FastGemma3MLP,
    GemmaAttention: FastGemmaAttention,
    Gemma2Attention: FastGemma2Attention,
    Gemma3Attention: FastGemma3Attention,
}
ORIGINAL = {fast: original for original, fast in FAST.items()}


def why_not(module: nn.Module) -> str | None:
    """Returns why this module can never run on the kernels, or None if it can."""
    if type(module) not in FAST:
        return f"{type(module).__name__} is not one of transformers' own Gemma classes"
    if FAST[type(module)].part == "mlp" and not _is_tanh_gelu(module.act_fn):
        return f"its activation is {module.act_fn}, not the GELU's tanh approximation"
    return None


def _is_tanh_gelu(activation: Any) -> bool:
    x = torch.linspace(-4, 4, 33)
    return torch.allclose(activation(x), F.gelu(x, approximate="tanh"), rtol=0, atol=1e-5)
