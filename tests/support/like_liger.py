"""Replaces transformers' Gemma classes the way Liger does. A factor of 1.01 shows which code ran.

Imports no gemma_fast, so that a test can replace them before gemma_fast.hf is imported."""

import importlib

import torch
from torch import nn

CLASSES = {
    "gemma": ("GemmaRMSNorm", "GemmaMLP"), "gemma2": ("Gemma2RMSNorm", "Gemma2MLP"),
    "gemma3": ("Gemma3RMSNorm", "Gemma3MLP"), "gemma4": ("Gemma4RMSNorm", "Gemma4TextMLP"),
}  # fmt: skip


class LigerNorm(nn.Module):
    """Has Liger's attributes: `variance_epsilon`, not `eps`. The factor 1.01 makes it visible."""

    def __init__(self, dim, eps=1e-6, with_scale=True):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.zeros(dim)), eps

    def forward(self, x):
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return 1.01 * y * (1 + getattr(self, "weight", 0.0))


class LigerMLP(nn.Module):
    """Has no act_fn, as in Liger."""

    def __init__(self, config, layer_idx=0):
        super().__init__()
        size = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = (nn.Linear(*size, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(*size[::-1], bias=False)

    def forward(self, x):
        gate = nn.functional.gelu(self.gate_proj(x), approximate="tanh")
        return 1.01 * self.down_proj(gate * self.up_proj(x))


def replace_classes(set_attribute=setattr):
    for family, (norm, mlp) in CLASSES.items():
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        set_attribute(module, norm, LigerNorm)
        set_attribute(module, mlp, LigerMLP)
