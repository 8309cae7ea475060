"""Chooses which weights of a model stay packed, and in which packing."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch

from gemma_fast.kernels.cpu.library import library
from gemma_fast.kernels.packed import PackedWeight, Packing, common_packing
from gemma_fast.model.gemma import Gemma

Packings = Mapping[str, Packing | None]  # tensor of the checkpoint → its packing; None: not packed
TABLES = "embed_tokens", "embed_tokens_per_layer"  # weights of which single rows are read
SLOW = 1 << 26  # packed elements from which a CPU without kernels for them takes much more time


def pack_weights(
    model: Gemma, packings: Packings, device: torch.device, source: str
) -> dict[str, PackedWeight]:
    """Replaces the weights whose parts are all packed. Returns name → new weight.

    model   on the meta device; its dtype is the one that is computed in
    device  where the weights will be
    source  names the checkpoint in warnings: that a weight is unpacked because only some of its
            parts are packed, and that a CPU without kernels unpacks weights in each call
    """
    packed: dict[str, PackedWeight] = {}
    mixed = []  # for each weight of which only some parts are packed: a part that is, one that not
    for name, tensors in model.parts.items():
        known = [packing for tensor in tensors if (packing := packings.get(tensor)) is not None]
        if known and len(known) < len(tensors):
            mixed.append({packings.get(tensor) is None: tensor for tensor in tensors})
        elif known:
            packing = _narrowed(common_packing(known), model.dtype)
            packed[name] = PackedWeight(model.get_parameter(name).shape, packing)
            _replace(model, name, packed[name])
    if mixed:
        warnings.warn(
            f"{source}: {len(mixed)} matmuls are unpacked, because only some of their parts can"
            f" stay packed: {mixed[0][False]} can, but {mixed[0][True]} cannot",
            stacklevel=3,
        )
    if device.type == "cpu":
        _warn_of_slow(model, packed, source)
    return packed


def multiplies_bf16() -> bool:
    """Whether this CPU has kernels for packed weights, and instructions for bf16 matmuls."""
    features = torch.cpu.get_capabilities()
    return library() is not None and any(
        features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")
    )


def _in_matmul(model: Gemma, name: str) -> bool:
    return name not in TABLES or (name == "embed_tokens" and model.lm_head is None)


def _narrowed(packing: Packing, dtype: torch.dtype) -> Packing:
    """Returns the packing with scales in fp16 instead of fp32, unless the model is in fp32."""
    wide = packing.scale == torch.float32 and dtype != torch.float32
    return packing._replace(scale=torch.float16) if wide else packing


def _replace(model: Gemma, name: str, weight: PackedWeight) -> None:
    module_name, _, attribute = name.rpartition(".")
    module = model.get_submodule(module_name)
    delattr(module, attribute)  # a module cannot replace a parameter
    setattr(module, attribute, weight)


def _warn_of_slow(model: Gemma, packed: Mapping[str, PackedWeight], source: str) -> None:
    """Warns if a CPU without kernels for packed weights unpacks large weights in each call."""
    slow = sum(weight.numel() for name, weight in packed.items() if _in_matmul(model, name))
    if slow >= SLOW and library() is None:
        warnings.warn(
            f"{source}: without the kernels for this CPU, packed weights are unpacked again for"
            " each token: quantize='none' is faster, but needs"
            f" {slow * model.dtype.itemsize / 1e9:.1f} GB for them",
            stacklevel=4,
        )
