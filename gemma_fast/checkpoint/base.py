"""Defines Checkpoint, which gives the config of a text model and reads tensors by name.

    checkpoint = open_checkpoint("google/gemma-3-270m")
    checkpoint.config, checkpoint.dtype, checkpoint.shapes
    checkpoint.copy("model.norm.weight", out)

Everything in a file is untrusted. Opening a checkpoint reads headers only, and compares every
name, shape and dtype with the config before anything large is allocated. Tensors are then read one
at a time, directly into the model's memory.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_fast.config import GemmaConfig

# Patterns of transformers' tensor names: prefixes of the text model in a multimodal model, tensors
# of the vision part, and the lm_head.
MULTIMODAL_PREFIX = re.compile(r"^(language_model\.model|model\.language_model)\.")
NOT_TEXT = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
TIED_HEAD = re.compile(r"((model\.)?language_model\.)?lm_head\.weight$")


class Checkpoint(ABC):
    """The tensors of a text model, in files or in memory, under transformers' names.

    config             the model's config
    dtype              dtype of the embedding; None for GGUF and for random weights
    tensors            name → tensor if the tensors are in memory, else None
    device             device of the tensors in memory, else None
    path               directory or file; a name for error messages if there is none
    generation_config  content of generation_config.json; {} if there is none
    shapes             name → shape of each tensor
    files              name → file that contains the tensor; {} if there are no files
    """

    config: GemmaConfig
    dtype: torch.dtype | None = None
    tensors: dict[str, Tensor] | None = None
    device: torch.device | None = None
    path: Path
    generation_config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, Path]

    def check(self) -> None:
        """Raises ValueError, with file and tensor name, if a tensor is missing, unknown, or has
        another shape than the config requires."""
        expected = self.config.tensor_shapes()
        for name, shape in expected.items():
            if name not in self.shapes:
                raise ValueError(
                    f"{self.path}: tensor {name} is missing: download or convert the model again"
                )
            if self.shapes[name] != shape:
                raise ValueError(
                    f"{self.files[name]}: tensor {name} has shape {self.shapes[name]},"
                    f" but the config requires {shape}: download or convert the model again"
                )
        for name in self.shapes:
            if name not in expected:
                raise ValueError(
                    f"{self.files[name]}: tensor {name} is unknown: the config's model has no"
                    " tensor of this name"
                )

    @torch.no_grad()
    def copy(self, name: str, out: Tensor) -> None:
        """Copies one tensor to `out`, which must have the same shape. Converts dtype and device.

        Needs host memory for the tensor as stored, and for the part that is converted at once.
        """
        assert out.shape == self.shapes[name], f"{name}: {out.shape=} is not {self.shapes[name]}"
        self._read(name, out)

    @abstractmethod
    def _read(self, name: str, out: Tensor) -> None: ...


def parse_config(
    path: Path, parse: Callable[[dict[str, Any]], GemmaConfig], content: dict[str, Any]
) -> GemmaConfig:
    """Returns `parse(content)`. If that raises ValueError, adds the path to the message."""
    try:
        return parse(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
