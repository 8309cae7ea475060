"""Splits the tensors in which files store the matrices of all experts of a layer.

transformers and GGUF store two or three tensors per layer, quantized safetensors files store one
per matrix. Here every matrix of an expert is a tensor, `experts.E.gate_proj.weight` and so on, so
that weights are read, rounded and packed one expert at a time.

    experts.gate_up_proj              [experts, 2 * moe_intermediate_size, hidden]: gate, then up
    experts.gate_proj, .up_proj       [experts, moe_intermediate_size, hidden], only in GGUF
    experts.down_proj                 [experts, hidden, moe_intermediate_size]
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from gemma_fast.config import GemmaConfig

# Stored tensor → the matrices of an expert that are stacked in it.
STACKED = {
    "gate_up_proj": ("gate_proj", "up_proj"), "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",), "down_proj": ("down_proj",),
}  # fmt: skip
ROUTER = ".router.proj.weight"  # end of the name of a matrix that is never packed
_STORED = re.compile(rf"model\.layers\.(?:0|[1-9]\d*)\.experts\.({'|'.join(STACKED)})", re.ASCII)


class ExpertRows(NamedTuple):
    """One expert's matrix in a stored tensor."""

    name: str
    shape: tuple[int, int]
    expert: int
    start: int  # its first row among the expert's rows


def stored_shape(name: str, config: GemmaConfig) -> tuple[int, int, int] | None:
    """Returns the shape of a tensor that stores matrices of all experts; None for other names, and
    if the model has no experts."""
    match = _STORED.fullmatch(name) if config.num_experts else None
    if match is None:
        return None
    shapes = [_shape(matrix, config) for matrix in STACKED[match[1]]]
    return config.num_experts, sum(rows for rows, _ in shapes), shapes[0][1]


def expert_rows(name: str, config: GemmaConfig) -> Iterator[ExpertRows]:
    """Yields the matrices in a tensor that has a `stored_shape`."""
    prefix, _, stored = name.rpartition(".")
    for expert in range(config.num_experts):
        start = 0
        for matrix in STACKED[stored]:
            shape = _shape(matrix, config)
            yield ExpertRows(f"{prefix}.{expert}.{matrix}.weight", shape, expert, start)
            start += shape[0]


def stored_shapes(config: GemmaConfig) -> dict[str, tuple[int, ...]]:
    """Returns name → shape of the tensors of a transformers model in memory."""
    shapes = {
        name: shape for name, shape in config.tensor_shapes().items() if ".experts." not in name
    }
    for layer in range(config.num_hidden_layers):
        for stored in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.experts.{stored}"
            if (shape := stored_shape(name, config)) is not None:
                shapes[name] = shape
    return shapes


def _shape(matrix: str, config: GemmaConfig) -> tuple[int, int]:
    width, hidden = config.moe_intermediate_size, config.hidden_size
    return (hidden, width) if matrix == "down_proj" else (width, hidden)
