"""Opens a directory of safetensors files that transformers saved."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gemma_fast.checkpoint.base import (
    MULTIMODAL_PREFIX,
    NOT_TEXT,
    TIED_HEAD,
    Checkpoint,
    parse_config,
)
from gemma_fast.checkpoint.config_files import config_from_json
from gemma_fast.checkpoint.hub import read_json

INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


class SafetensorsCheckpoint(Checkpoint):
    """A checkpoint in a directory that transformers saved. For a multimodal Gemma 3, it contains
    only the text model."""

    def __init__(self, path: Path):
        self.path = path
        config_file, generation_file = path / "config.json", path / "generation_config.json"
        self.config = parse_config(config_file, config_from_json, read_json(config_file))
        self.generation_config = read_json(generation_file) if generation_file.is_file() else {}

        self.shapes, self.files, self._stored_names = {}, {}, {}
        for file, listed in _shards(path).items():
            for stored_name, shape, dtype in _header(file, listed):
                name = MULTIMODAL_PREFIX.sub("model.", stored_name)
                if name in self.files:
                    raise ValueError(f"{file}: tensor {name} is in {self.files[name]} as well")
                if dtype not in DTYPES:
                    allowed = ", ".join(DTYPES)
                    raise ValueError(
                        f"{file}: tensor {name} has dtype {dtype}, which is not one of {allowed}"
                    )
                if name == "model.embed_tokens.weight":
                    self.dtype = DTYPES[dtype]
                self.shapes[name], self.files[name] = shape, file
                self._stored_names[name] = stored_name

    def _read(self, name: str, out: Tensor) -> None:
        # Open the file for each tensor, because closing it releases the pages that were read.
        with _open_safetensors(self.files[name]) as tensors:
            out.copy_(tensors.get_tensor(self._stored_names[name]))


def _shards(path: Path) -> dict[Path, set[str]]:
    """Returns a dict: file → names of the tensors that the index lists for the file. A model in a
    single file has no index, so the set of names is empty."""
    if (single := path / "model.safetensors").is_file():
        return {single: set()}
    if not (path / INDEX).is_file():
        found = ", ".join(sorted(file.name for file in path.glob("*.safetensors"))) or "none"
        raise ValueError(
            f"{path} has neither model.safetensors nor {INDEX} (shards: {found}): download the"
            " weights again"
        )
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path / INDEX} has no weight_map from tensor names to files")

    shards: dict[Path, set[str]] = {}
    for name, shard in weight_map.items():
        # A file name without / cannot point outside the directory. Symlinks are allowed, because
        # the Hub's cache consists of symlinks.
        if not isinstance(shard, str) or not SHARD.fullmatch(shard):
            raise ValueError(f"{path / INDEX}: {shard!r} is not the name of a .safetensors file")
        shards.setdefault(path / shard, set()).add(name)
    for file in shards:
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist, but {INDEX} lists it: download it again"
            )
    return shards


def _header(file: Path, listed: set[str]) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Yields the stored name, shape and dtype of each tensor of the text model in a file. Raises
    ValueError if a tensor in `listed` is not in the file."""
    with _open_safetensors(file) as tensors:
        stored_names = set(tensors.keys())
        if absent := sorted(listed - stored_names):
            raise ValueError(
                f"{file}: tensor {absent[0]} is missing, but {INDEX} lists it: download it again"
            )
        for stored_name in sorted(stored_names):
            if not (NOT_TEXT.match(stored_name) or TIED_HEAD.match(stored_name)):
                header = tensors.get_slice(stored_name)
                yield stored_name, tuple(header.get_shape()), header.get_dtype()


@contextmanager
def _open_safetensors(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(
            f"{file} is not a readable safetensors file: {error}; download it again"
        ) from error
