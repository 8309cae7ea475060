"""Runs the reference on one prompt and keeps what the pictures show, through `Reference.observe`.

Each class changes one thing: `Recorder` measures the results of the steps, `WithoutNorms` leaves
out the norms, `WithoutFactor` leaves out the factor of the embedding, `Clock` measures time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from gemma_fast.reference import Reference

Measure = Callable[[Tensor], Any]
SHOWN = 64  # the most tokens of a prompt that a picture shows


def std(x: Tensor) -> float:
    """Returns the standard deviation of all elements of x, in float64."""
    return float(x.double().std())


def rms(x: Tensor) -> list[float]:
    """Returns the root mean square of each of the last SHOWN tokens of x :: [1, t, hidden]."""
    return x[0, -SHOWN:].double().square().mean(-1).sqrt().tolist()


def rms_of_all(x: Tensor) -> float:
    """Returns the root mean square of all elements of x."""
    return float(x.double().square().mean().sqrt())


def rms_of_layers(x: Tensor) -> list[float]:
    """Returns the root mean square of each layer's part of x :: [1, t, layers, p]."""
    return x[0].double().square().mean((0, 2)).sqrt().tolist()


def share_above_0(x: Tensor) -> float:
    """Returns which share of the elements of x is greater than 0."""
    return float((x > 0).double().mean())


def largest(x: Tensor) -> float:
    """Returns the largest absolute value of x."""
    return float(x.abs().max())


def pair_lengths(q: Tensor) -> list[list[float]]:
    """Returns the length of each rotated channel pair, mean over tokens :: [heads, d / 2].

    q :: [1, heads, t, d]
    """
    x1, x2 = q[0].float().chunk(2, dim=-1)
    return torch.hypot(x1, x2).mean(1).tolist()


def flatness(weights: Tensor, visible: Tensor) -> list[float]:
    """Returns the entropy of the weights of a query over that of equal weights, mean over queries
    that see more than one key :: [heads]; 1 is flat, 0 is one key.

    weights :: [heads, t, s]; visible :: [t, s]
    """
    keys = visible.sum(-1)
    share = torch.special.entr(weights).sum(-1) / keys.log().clamp(min=1e-9)
    several = keys > 1
    return ((share * several).sum(-1) / several.sum().clamp(min=1)).tolist()


def last_token(x: Tensor) -> list[Any]:
    """Returns the row of the last token of x :: [t, k]."""
    return x[-1].tolist()


BEFORE_NORM = "mlp_before_norm"  # output of the MLP, or of MLP and experts
STREAM = ("embed", "after_attention", "after_mlp", "after_per_layer", "layer_scalar")


class Recorder(Reference):
    """Keeps a measure of each step of a forward pass in `seen`: step name → numbers."""

    measures: ClassVar[dict[str, Measure]] = {
        **dict.fromkeys((*STREAM, "attention", "mlp", "post_per_layer_input_norm"), std),
        **dict.fromkeys(("o_proj", "per_layer_projection"), std),
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "v_norm"), rms_of_all),
        "queries": pair_lengths,
        "chosen": last_token,
        "per_layer_inputs": rms_of_layers,
        "per_layer_input_gate": share_above_0,
        "per_layer_geglu": rms_of_all,
        **dict.fromkeys(("embed_tokens", "lm_head"), largest),
    }

    def __init__(self, reference: Reference, **changes: Any) -> None:
        """reference: its weights are used, not copied; changes: fields of its config to replace."""
        super().__init__(replace(reference.config, **changes), reference.weights)
        self.seen: dict[str, Any] = {}
        self.visible = torch.empty(0)  # [1, t, s], bool: of the layer that runs

    def layer(self, i: int, hiddens: Tensor, visible: Tensor, *args: Any) -> Any:
        self.visible = visible
        return super().layer(i, hiddens, visible, *args)

    def norm(self, x: Tensor, name: str) -> Tensor:
        out = super().norm(x, name)
        if name == "model.norm":
            self.seen["final_norm"] = {"before": rms(x), "after": rms(out)}
        if name.endswith(".post_feedforward_layernorm"):
            self.seen[name.replace("post_feedforward_layernorm", BEFORE_NORM)] = std(x)
        return out

    def observe(self, name: str, x: Any) -> Any:
        step = name.rpartition(".")[2]
        if measure := self.measures.get(step):
            self.seen[name] = measure(x)
        if step == "scores" and self.config.attn_logit_softcapping:
            self.seen[name] = largest(x.masked_fill(~self.visible[:, None], 0))
        if name.endswith("router.weights"):
            self.seen[name] = last_token(x)
        if name.endswith("self_attn.weights"):
            weights, visible = x[0, :, -SHOWN:].float(), self.visible[0, -SHOWN:]
            self.seen[name.replace(step, "flatness")] = flatness(weights, visible)
            hidden = weights.masked_fill(~visible, torch.nan)
            self.seen[name] = hidden[..., -SHOWN:].cpu()
        return x


class WithoutNorms(Recorder):
    measures: ClassVar[dict[str, Measure]] = dict.fromkeys(STREAM, std)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x


class WithoutFactor(Recorder):
    measures: ClassVar[dict[str, Measure]] = {"embed": std, "attention": std, "mlp": std}

    def observe(self, name: str, x: Any) -> Any:
        if name == "embed":
            x = x / self.config.hidden_size**0.5
        return super().observe(name, x)


class Clock(Reference):
    """Adds the time since the previous step to `seconds`: name of a step → seconds."""

    def __init__(self, reference: Reference) -> None:
        super().__init__(reference.config, reference.weights)
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def start(self) -> None:
        self.seconds, self.last = {}, time.perf_counter()

    def observe(self, name: str, x: Any) -> Any:
        weight = self.weights["model.norm.weight"]
        if weight.is_cuda:
            torch.cuda.synchronize(weight.device)
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0) + now - self.last
        self.last = now
        return x
