"""Defines a checkpoint that takes config and weights from a transformers model in memory.

This module does not import transformers, because the model's attributes contain all it needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from gemma_fast.checkpoint.base import EMBEDDING, HEAD, Checkpoint
from gemma_fast.checkpoint.config_json import config_from_json
from gemma_fast.checkpoint.experts import expert_rows, stored_shape, stored_shapes
from gemma_fast.checkpoint.names import text_name
from gemma_fast.config import GemmaConfig

CLASSES = (
    "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration",
    "Gemma4ForCausalLM", "Gemma4ForConditionalGeneration", "Gemma4UnifiedForCausalLM",
    "Gemma4UnifiedForConditionalGeneration",
)  # fmt: skip
SCALAR = ".layer_scalar"  # end of the name of a buffer
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TransformersCheckpoint(Checkpoint):
    """A checkpoint that shares the weights of the text model in an instance of one of CLASSES.

    Raises ValueError for other classes, variants that this project does not support, and weights
    that are quantized, wrapped by an adapter, incomplete, on several devices or in several dtypes.
    """

    tensors: dict[str, Tensor]

    def __init__(self, source: nn.Module) -> None:
        self.path = Path(type(source).__name__)
        found = _text_weights(source)
        self.config = replace(_read_config(source), tie_word_embeddings=_is_tied(found))
        self.tensors = dict(_split_experts(_check_weights(found, self.config), self.config))
        self.shapes = {name: tuple(weight.shape) for name, weight in self.tensors.items()}
        embedding = self.tensors[EMBEDDING]
        self.dtype, self.device = embedding.dtype, embedding.device
        generation = getattr(source, "generation_config", None)
        given = generation.to_dict() if generation is not None else {}
        self.generation_config = {k: v for k, v in given.items() if v is not None}

    def _read(self, name: str, out: Tensor) -> None:
        out.copy_(self.tensors[name])

    def rows(self, name: str, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        return self.tensors[name][start:stop].to(device)


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


def _text_weights(source: nn.Module) -> dict[str, Tensor]:
    """Returns a dict: name in a checkpoint → parameter or buffer with a weight of the text model.
    Gemma 4 has one number per layer in a buffer."""
    buffers = (item for item in source.named_buffers() if item[0].endswith(SCALAR))
    found: dict[str, Tensor] = {}
    for stored_name, weight in (*source.named_parameters(remove_duplicate=False), *buffers):
        if (name := text_name(stored_name)) is not None:
            found[name] = weight
    return found


def _is_tied(found: dict[str, Tensor]) -> bool:
    """Returns True if the head is the embedding, equals it, or does not exist."""
    head, embedding = found.get(HEAD), found.get(EMBEDDING)
    if head is None or embedding is None or head is embedding:
        return True
    same = (head.shape, head.dtype, head.device) == (
        embedding.shape, embedding.dtype, embedding.device
    )  # fmt: skip
    return same and not head.is_meta and torch.equal(head, embedding)


def _check_weights(found: dict[str, Tensor], config: GemmaConfig) -> dict[str, Tensor]:
    """Returns the parameters that the config requires, without gradients. Raises ValueError if they
    do not match the config."""
    expected = stored_shapes(config)
    if config.tie_word_embeddings:
        found.pop(HEAD, None)
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
    for what in ("device", "dtype"):
        kinds = {getattr(weight, what): name for name, weight in found.items()}
        if len(kinds) > 1:
            places = ", ".join(f"{name} {kind}" for kind, name in kinds.items())
            raise ValueError(
                f"the weights have several {what}s: {places}; move them to one with model.to(…)"
            )
    return {name: weight.detach() for name, weight in found.items()}


def _split_experts(weights: dict[str, Tensor], config: GemmaConfig) -> Iterator[tuple[str, Tensor]]:
    """Yields name and weight. Weights of all experts are split into views of each expert's."""
    for name, weight in weights.items():
        if stored_shape(name, config) is None:
            yield name, weight
            continue
        for rows in expert_rows(name, config):
            yield rows.name, weight[rows.expert, rows.start : rows.start + rows.shape[0]]


def _check_weight(name: str, weight: Tensor, shape: tuple[int, ...]) -> None:
    kind = Tensor if name.endswith(SCALAR) else nn.Parameter
    if type(weight) is not kind or weight.dtype not in DTYPES:
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
