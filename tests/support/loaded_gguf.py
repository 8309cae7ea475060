"""Loads GGUF files with packed weights, and reads the weights of the model."""

import warnings

import torch

from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.kernels.packed import PackedWeight


def weights(model) -> dict[str, torch.Tensor]:
    """Returns the model's weights as float32, by the checkpoint's names."""
    found = {}
    for name, tensors in model.parts.items():
        weight = model
        for part in name.split("."):
            weight = getattr(weight, part)
        if isinstance(weight, PackedWeight):
            weight = weight.weight.unpack(torch.float32)
        shapes = model.config.tensor_shapes()
        rows = weight.split([shapes[tensor][0] for tensor in tensors])
        found |= dict(zip(tensors, rows, strict=True))
    return found


def loaded(path, **options) -> GemmaForCausalLM:
    """Loads a model without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return GemmaForCausalLM.from_pretrained(path, device="cpu", dtype="float32", **options)


def assert_holds(model, matrices) -> None:
    found = weights(model)
    for name, expected in matrices.items():
        assert torch.equal(found[name], expected), name
