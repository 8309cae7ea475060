"""Subclasses transformers' Gemma layers, and linears with a quantized weight, with a forward on the
kernels.

`accelerate` sets the class of a module to the subclass. The module keeps its parameters and calls
the same submodules, so adapters and hooks on the submodules still work.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from gemma_fast.hf.attention import Run, falls_back, reason
from gemma_fast.hf.cache import GemmaFastCache, Ring
from gemma_fast.hf.experts import has_hooks, why_not_router
from gemma_fast.hf.masks import RING_ERROR, is_bounds
from gemma_fast.hf.packed import bits_of, pack, weight_packed
from gemma_fast.kernels.experts import experts
from gemma_fast.kernels.geglu import geglu
from gemma_fast.kernels.matvec import linear
from gemma_fast.kernels.packed import PackedWeight
from gemma_fast.kernels.rmsnorm import rms_norm
from gemma_fast.kernels.router import route

# The modules of transformers with layers that the kernels can replace, and the number that their
# norms add to the weight.
NORM_OFFSETS = {
    f"transformers.models.{name}.modeling_{name}": offset
    for name, offset in (
        ("gemma", 1.0), ("gemma2", 1.0), ("gemma3", 1.0), ("gemma4", 0.0), ("gemma4_unified", 0.0)
    )
}  # fmt: skip


class Fast(nn.Module):
    part: ClassVar[str]
    strict: bool = False
    run: Run | None = None  # code path of the last call that was not compiled

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles the module's original class, because fast_class creates its own."""
        state = super().__reduce_ex__(protocol)[2:]
        return (_new, (original_class(type(self)), self.part), *state)


class FastNorm(Fast):
    part = "norm"
    eps: float
    offset: float

    def forward(self, x: Tensor) -> Tensor:
        if falls_back(self, self.part, x, reason(self, x)):
            return super().forward(x)
        weight = getattr(self, "weight", None)  # Gemma 4's norm of values has none
        return rms_norm(x, weight, self.eps, self.offset)


class FastMLP(Fast):
    part = "mlp"
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    act_fn: Any
    checked: Any  # the activation that `accelerate` found to be the GELU's tanh approximation

    def forward(self, x: Tensor) -> Tensor:
        if falls_back(self, self.part, x, reason(self, x) or changed_activation(self)):
            return super().forward(x)
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


class FastRouter(Fast):
    """The router of Gemma 4's experts. The kernel also computes what its norm and its projection
    do, but these are not rounded to the dtype of x."""

    part = "router"
    config: Any
    eps: float
    proj: nn.Linear
    scale: Tensor
    per_expert_scale: Tensor

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns p :: [tokens, experts], fp32, which transformers records as router logits; and
        the chosen experts' weights, fp32, and their indices, int64 :: [tokens, top_k]."""
        x = hidden_states
        if falls_back(self, self.part, x, reason(self, x) or why_not_router(self, x.dtype)):
            return super().forward(x)
        p, chosen, weights = route(
            x, self.scale, self.proj.weight, self.per_expert_scale,
            top_k=self.config.top_k_experts, eps=self.eps,
        )  # fmt: skip
        return p, weights, chosen.long()


class FastExperts(Fast):
    """All experts of a layer. Like transformers' experts implementations, it is called with the
    router's choice; but `accelerate` sets the class, as for other parts: transformers selects
    experts implementations by their name in the config, and `generate` changes that name."""

    part = "experts"
    gate_up_proj: Tensor  # [experts, 2 * width, dim]
    down_proj: Tensor  # [experts, dim, width]
    act_fn: Any
    checked: Any

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x, gate_up, down = hidden_states, self.gate_up_proj, self.down_proj
        why = reason(self, x, top_k_weights) or changed_activation(self)
        if not gate_up.dtype == down.dtype == x.dtype:
            why = why or f"the weights are {gate_up.dtype}, {down.dtype}, but x is {x.dtype}"
        if falls_back(self, self.part, x, why):
            return super().forward(x, top_k_index, top_k_weights)
        chosen, weights = top_k_index.int(), top_k_weights.float()
        return experts(x, gate_up.flatten(0, 1), down.flatten(0, 1), chosen, weights)[0]


def changed_activation(module: FastMLP | FastExperts) -> str | None:
    """Returns why act_fn must be called, or None if the kernel gives the same result."""
    if module.act_fn is not module.checked:
        return "act_fn was replaced after accelerate: call accelerate(model) again"
    if has_hooks(module.act_fn):
        return "act_fn has hooks, and the kernel does not call it"
    return None


class FastAttention(Fast):
    """Runs transformers' forward, which calls `attention.attend` by its name in the config."""

    part = "attention"
    layer_idx: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # transformers 5.24 renamed `past_key_values` to `cache`.
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        mask = kwargs.get("attention_mask")
        if isinstance(cache, GemmaFastCache) and not is_bounds(mask):
            # Gemma 4's last layers have no layer in the cache. An earlier layer has checked their
            # mask.
            own = cache.layers[self.layer_idx : self.layer_idx + 1]
            if any(isinstance(layer, Ring) for layer in own):  # a mask from the caller
                raise ValueError(RING_ERROR)
        return super().forward(*args, **kwargs)


class FastLinear(Fast):
    """A linear whose weight compressed-tensors or torchao has quantized, see packed.py.

    On a GPU it has no `weight_packed` while it is accelerated: `packed` holds the same integers.
    Its state_dict has `weight_packed`.
    """

    part = "linear"
    bias: Tensor | None
    weight_packed: nn.Parameter | None
    packed: PackedWeight  # no submodule: the model's parameters keep their names
    own_forward: Any  # the forward that compressed-tensors has set on the module, or None

    def forward(self, x: Tensor) -> Tensor:
        if not falls_back(self, self.part, x, reason(self, x)):
            y = linear(x, self.packed)  # type: ignore[arg-type]
            return y if self.bias is None else y + self.bias
        if "weight" in self._parameters:  # torchao
            return super().forward(x)
        return F.linear(x, self.packed.weight.unpack(x.dtype), self.bias)

    def take(self) -> None:
        """Packs the weight for the kernels."""
        vars(self)["packed"] = pack(self)  # type: ignore[arg-type]
        self._free()

    def _free(self) -> None:
        if "weight_packed" in self._parameters:
            self.weight_packed = None

    def give_back(self) -> None:
        """Undoes `take`."""
        if self._parameters.get("weight_packed", self) is None:
            data = weight_packed(self.packed, bits_of(self))
            self.weight_packed = nn.Parameter(data, requires_grad=False)

    def _apply(self, fn: Any, recurse: bool = True) -> FastLinear:
        self.give_back()
        super()._apply(fn, recurse)
        self.take()
        return self

    def _save_to_state_dict(self, *args: Any) -> None:
        self.give_back()
        super()._save_to_state_dict(*args)
        self._free()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if any(name.startswith(prefix) for name in state_dict):
            raise RuntimeError(
                f"{prefix}*: call gemma_fast.hf.restore(model) before load_state_dict"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


@functools.cache
def fast_class(original: type[nn.Module], part: str) -> type[Fast]:
    """Returns the subclass of `original`: torch.nn.Linear, or a class of transformers."""
    bases = FastNorm, FastMLP, FastRouter, FastExperts, FastAttention, FastLinear
    base = next(x for x in bases if x.part == part)
    attributes: dict[str, Any] = {"__module__": __name__}
    if part == "norm":
        attributes["offset"] = NORM_OFFSETS[original.__module__]
    return type(f"Fast{original.__name__}", (base, original), attributes)


def original_class(kind: type[nn.Module]) -> type[nn.Module]:
    return kind.__bases__[1] if issubclass(kind, Fast) else kind


def _new(original: type[nn.Module], part: str) -> Fast:
    kind = fast_class(original, part)  # type: ignore[arg-type]
    return kind.__new__(kind)


def swap_in(module: nn.Module, part: str, strict: bool) -> None:
    """Runs the module on the kernels."""
    _set_class(module, fast_class(original_class(type(module)), part))  # type: ignore[arg-type]
    module.strict = strict  # type: ignore[assignment]
    if part in ("mlp", "experts"):
        vars(module)["checked"] = module.act_fn  # not a submodule: that would list act_fn twice
    if isinstance(module, FastLinear):
        vars(module)["own_forward"] = vars(module).pop("forward", None)
        module.take()


def swap_out(module: nn.Module) -> None:
    """Undoes swap_in, if it was called."""
    if isinstance(module, FastLinear):
        module.give_back()
        if module.own_forward is not None:
            vars(module)["forward"] = module.own_forward
    if isinstance(module, Fast):
        _set_class(module, original_class(type(module)))
        for attribute in ("strict", "run", "checked", "packed", "own_forward"):
            vars(module).pop(attribute, None)


def _set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Sets the class, and the forward that compressed-tensors calls once it has offloaded the
    module, as it does when it unpacks a model's weights."""
    if vars(module).get("_original_forward_func") is type(module).forward:
        vars(module)["_original_forward_func"] = kind.forward
    module.__class__ = kind  # type: ignore[assignment]
