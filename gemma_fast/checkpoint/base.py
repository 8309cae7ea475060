"""Defines Checkpoint, which gives the config of a text model and reads tensors by name.

    checkpoint = open_checkpoint("google/gemma-3-270m")
    checkpoint.config, checkpoint.dtype, checkpoint.shapes
    checkpoint.copy("model.norm.weight", out)

Everything in a file is untrusted. Opening a checkpoint reads headers only, and compares every
name, shape and dtype with the config before anything large is allocated. Tensors are then read one
at a time, directly into the model's memory.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gemma_fast.checkpoint.experts import ExpertRows, expert_rows, stored_shape
from gemma_fast.checkpoint.names import is_unused
from gemma_fast.config import GemmaConfig
from gemma_fast.kernels.packed import PackedRows, Packing

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PER_LAYER_EMBEDDING = "model.embed_tokens_per_layer.weight"
ROWS = 4096  # rows of the head and the embedding that are compared at once
T = TypeVar("T")


def on_cpu() -> AbstractContextManager[Any]:
    """Returns a context in which PyTorch allocates on the CPU, which readers of files need. It is
    empty if the CPU is the caller's default already: torch.device's context slows each call."""
    on_cpu = torch.get_default_device().type == "cpu"
    return nullcontext() if on_cpu else torch.device("cpu")


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs PyTorch's ops on this thread. Short ops, limited by memory, take as long on several, and
    ten times as long if other processes need the cores: threads wait for each other after each.

    Does nothing if the program has other threads: those that begin to use PyTorch in this time, or
    load a model, too, would keep the setting."""
    if threading.active_count() > 1:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Checkpoint(ABC):
    """The tensors of a text model, in files or in memory, under transformers' names.

    config             the model's config
    dtype              dtype in which the weights are used by default; None for GGUF and for random
                       weights
    tensors            name → tensor if the tensors are in memory, else None
    device             device of the tensors in memory, else None
    path               directory or file; a name for error messages if there is none
    generation_config  content of generation_config.json; {} if there is none
    shapes             name → shape of each tensor
    """

    config: GemmaConfig
    dtype: torch.dtype | None = None
    tensors: dict[str, Tensor] | None = None
    device: torch.device | None = None
    path: Path
    generation_config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    @torch.no_grad()
    def copy(self, name: str, out: Tensor) -> None:
        """Copies one tensor to `out`, which must have the same shape. Converts dtype and device.

        Needs host memory for the tensor as stored, and for the part that is converted at once.
        """
        assert out.shape == self.shapes[name], f"{name}: {out.shape=} is not {self.shapes[name]}"
        self._read(name, out)

    def packing(self, name: str) -> Packing | None:
        """Returns how a tensor is packed, or None if it is not, or must be unpacked."""
        return None

    def packed_rows(self, name: str, start: int, stop: int) -> PackedRows:
        """Returns rows `start` to `stop` - 1 of a tensor that has a packing, exactly as stored:
        scales may be in fp32, whatever the packing says."""
        raise NotImplementedError

    def warn_of_unpacked(self) -> None:
        """Warns of quantized weights that do not stay packed, and says what that costs."""
        return

    @abstractmethod
    def rows(self, name: str, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        """Returns rows `start` to `stop` - 1 of a matrix, unpacked, on the device."""

    @abstractmethod
    def _read(self, name: str, out: Tensor) -> None: ...


class FileCheckpoint(Checkpoint):
    """A checkpoint in files. A subclass calls `add` for each tensor that it finds.

    files   name → file that contains the tensor
    stored  name → what the subclass needs to read the tensor
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes = {}
        self.files: dict[str, Path] = {}
        self.stored: dict[str, Any] = {}

    def add(self, name: str, shape: tuple[int, ...], file: Path, stored: Any) -> None:
        """Adds a tensor. Splits a tensor with matrices of all experts. Raises ValueError if that
        has another shape than the config requires, or if there is already a tensor of the name."""
        if (required := stored_shape(name, self.config)) is not None:
            if shape != required:
                raise ValueError(_misshapen(file, stored.name, shape, required))
            for rows in expert_rows(name, self.config):
                self.add(rows.name, rows.shape, file, self._split(stored, rows))
            return
        if name in self.files:
            raise ValueError(f"{file}: tensor {name} is in {self.files[name]} as well")
        self.shapes[name], self.files[name], self.stored[name] = shape, file, stored

    def check(self) -> None:
        """Raises ValueError, with file and tensor name, if a tensor is missing, unknown, or has
        another shape than the config requires. Sets config.tie_word_embeddings, and drops the
        tensors that the model does not use."""
        self._find_head()
        for name in [name for name in self.shapes if is_unused(name, self.config)]:
            self._drop(name)
        expected = self.config.tensor_shapes()
        for name, shape in expected.items():
            if name not in self.shapes:
                raise ValueError(
                    f"{self.path}: tensor {name} is missing: download or convert the model again"
                )
            if self.shapes[name] != shape:
                raise ValueError(_misshapen(self.files[name], name, self.shapes[name], shape))
        for name in self.shapes:
            if name not in expected:
                raise ValueError(
                    f"{self.files[name]}: tensor {name} is unknown: the config's model has no"
                    " tensor of this name; load the model with transformers"
                )

    def rows(self, name: str, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        return self._rows(name, start, stop).to(device)

    @abstractmethod
    def _split(self, stored: Any, rows: ExpertRows) -> Any:
        """Returns what the subclass needs to read one expert's matrix in a stored tensor."""

    @abstractmethod
    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows `start` to `stop` - 1 of a tensor as they are stored, dequantized."""

    def _find_head(self) -> None:
        """Finds out whether the output projection has a weight of its own, as transformers does.

        A stored head that differs from the embedding is used, whatever the config says. A head that
        equals the embedding is dropped. If the config says that they are tied, a head without an
        embedding is the weight of both.
        """
        if HEAD not in self.shapes:
            return
        if EMBEDDING not in self.shapes and self.config.tie_word_embeddings:
            self.add(EMBEDDING, self.shapes[HEAD], self.files[HEAD], self.stored[HEAD])
            self._drop(HEAD)
            return
        shape = self.config.vocab_size, self.config.hidden_size
        tied = self.shapes[HEAD] == self.shapes.get(EMBEDDING) == shape and all(
            torch.equal(*(self._rows(name, i, i + ROWS).float() for name in (HEAD, EMBEDDING)))
            for i in range(0, shape[0], ROWS)
        )
        self.config = replace(self.config, tie_word_embeddings=tied)
        if tied:
            self._drop(HEAD)

    def _drop(self, name: str) -> None:
        for table in (self.shapes, self.files, self.stored):
            del table[name]


def _misshapen(file: Path, name: str, shape: tuple[int, ...], required: tuple[int, ...]) -> str:
    return (
        f"{file}: tensor {name} has shape {shape}, but the config requires {required}: download or"
        " convert the model again"
    )


def parse_content(path: Path, parse: Callable[[dict[str, Any]], T], content: dict[str, Any]) -> T:
    """Returns `parse(content)`. If that raises ValueError, adds the path to the message."""
    try:
        return parse(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
