"""Defines a checkpoint that takes config and weights from a transformers model in memory.

This module does not import transformers, because the model's attributes contain all it needs.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from gemma_fast.checkpoint.base import MULTIMODAL_PREFIX, NOT_TEXT, TIED_HEAD, Checkpoint
from gemma_fast.checkpoint.config_files import config_from_json
from gemma_fast.config import GemmaConfig

CLASSES = (
    "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TransformersCheckpoint(Checkpoint):
    """A checkpoint that shares the weights of the text model in an instance of one of CLASSES.

    Raises ValueError for other classes, variants that this project does not support, an lm_head
    that is not tied to the embedding, and weights that are quantized, wrapped by an adapter,
    incomplete, on several devices or in several dtypes.
    """

    tensors: dict[str, Tensor]

    def __init__(self, source: nn.Module) -> None:
        self.path, self.files = Path(type(source).__name__), {}
        self.config = _read_config(source)
        self.tensors = _read_weights(source, self.config)
        self.shapes = {name: tuple(weight.shape) for name, weight in self.tensors.items()}
        embedding = self.tensors["model.embed_tokens.weight"]
        self.dtype, self.device = embedding.dtype, embedding.device
        generation = getattr(source, "generation_config", None)
        given = generation.to_dict() if generation is not None else {}
        self.generation_config = {k: v for k, v in given.items() if v is not None}

    def _read(self, name: str, out: Tensor) -> None:
        out.copy_(self.tensors[name])


def _read_config(source: nn.Module) -> GemmaConfig:
    kind = type(source).__name__
    if kind.startswith("Peft"):
        raise ValueError(f"{kind}: adapters are not supported; pass model.merge_and_unload()")
    if kind not in CLASSES or not hasattr(source.config, "to_dict"):
        raise ValueError(f"{kind} is not one of transformers' {', '.join(CLASSES)}")
    try:
        return config_from_json(source.config.to_dict())  # type: ignore[union-attr, operator]
    except ValueError as error:
        raise ValueError(f"{kind}: {error}") from error


def _read_weights(source: nn.Module, config: GemmaConfig) -> dict[str, Tensor]:
    """Returns a dict: name in a checkpoint → tensor of the text model. Raises ValueError if the
    tensors do not match the config."""
    found, head = {}, None
    for stored_name, weight in source.named_parameters(remove_duplicate=False):
        if TIED_HEAD.match(stored_name):
            head = weight
        elif not NOT_TEXT.match(stored_name):
            found[MULTIMODAL_PREFIX.sub("model.", stored_name)] = weight
    expected = config.tensor_shapes()
    for name in found:
        if name not in expected:
            way_out = "merge the adapter first (merge_and_unload)" if "lora" in name else ""
            raise ValueError(
                f"parameter {name} is not part of the config's model; {way_out}".rstrip("; ")
            )
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(
                f"parameter {name} is missing: fused and renamed weights are not supported"
            )
        _check_weight(name, found[name], shape)
    embedding = found["model.embed_tokens.weight"]
    if head is not None and head.data_ptr() != embedding.data_ptr():
        raise ValueError(
            "lm_head has its own weights: only an lm_head that is tied to embed_tokens is supported"
        )
    for what in ("device", "dtype"):
        kinds = {getattr(weight, what): name for name, weight in found.items()}
        if len(kinds) > 1:
            places = ", ".join(f"{name} {kind}" for kind, name in kinds.items())
            raise ValueError(
                f"the weights have several {what}s: {places}; move them to one with model.to(…)"
            )
    return {name: weight.detach() for name, weight in found.items()}


def _check_weight(name: str, weight: Tensor, shape: tuple[int, ...]) -> None:
    if type(weight) is not nn.Parameter or weight.dtype not in DTYPES:
        raise ValueError(
            f"parameter {name} is a {type(weight).__name__} of {weight.dtype}: quantized and"
            " distributed weights are not supported, only float32, bfloat16 and float16"
        )
    if weight.is_meta:
        raise ValueError(
            f"parameter {name} is on the meta device or offloaded, so it has no data: load the"
            " model on one device"
        )
    if weight.shape != shape:
        raise ValueError(
            f"parameter {name} has shape {tuple(weight.shape)}, but the config requires {shape}"
        )
