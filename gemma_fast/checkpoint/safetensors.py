"""Opens a directory of safetensors files that transformers saved."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gemma_fast.checkpoint.base import EMBEDDING, HEAD, FileCheckpoint, parse_content
from gemma_fast.checkpoint.config_json import config_from_json, dtype_name
from gemma_fast.checkpoint.hub import read_json
from gemma_fast.checkpoint.names import text_name, warn_of_skipped

INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"  # transformers applies an adapter that it finds beside a model
SHARD = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


class SafetensorsCheckpoint(FileCheckpoint):
    """A checkpoint in a directory that transformers saved. For a multimodal model, it contains
    only the text model. Its dtype is the one that config.json names, as in transformers."""

    def __init__(self, path: Path):
        super().__init__(path)
        if (adapter := path / ADAPTER).is_file():
            raise ValueError(
                f"{adapter}: adapters are not supported: load both with peft, then save"
                " model.merge_and_unload()"
            )
        config_file, generation_file = path / "config.json", path / "generation_config.json"
        content = read_json(config_file)
        self.config = parse_content(
            config_file, partial(config_from_json, source=str(config_file)), content
        )
        self.generation_config = read_json(generation_file) if generation_file.is_file() else {}

        found: list[str] = []
        stored_dtypes: dict[str, str] = {}
        for file, listed in _shards(path).items():
            for stored_name, shape, dtype in _header(file, listed):
                found.append(stored_name)
                name = text_name(stored_name)
                if name is None:
                    continue
                if dtype not in DTYPES:
                    allowed = ", ".join(DTYPES)
                    raise ValueError(
                        f"{file}: tensor {name} has dtype {dtype}, which is not one of {allowed}:"
                        " load the model with transformers, or convert the weights"
                    )
                self.add(name, shape, file, stored_name)
                stored_dtypes[name] = dtype
        warn_of_skipped(path, found)
        self.dtype = _dtype(config_file, dtype_name(content), stored_dtypes)

    def _read(self, name: str, out: Tensor) -> None:
        # Open the file for each tensor, because closing it releases the pages that were read.
        with _open_safetensors(self.files[name]) as tensors:
            out.copy_(tensors.get_tensor(self.stored[name]))

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        with _open_safetensors(self.files[name]) as tensors:
            return tensors.get_slice(self.stored[name])[start:stop]


def _dtype(config_file: Path, named: str | None, stored: Mapping[str, str]) -> torch.dtype | None:
    """Returns the dtype that the config names, or else that of the embedding or the head."""
    if named is None:
        names = [name for name in (EMBEDDING, HEAD) if name in stored]
        return DTYPES[stored[names[0]]] if names else None
    dtype = getattr(torch, named, None)
    if dtype not in DTYPES.values():
        raise ValueError(
            f"{config_file}: dtype {named!r} is not supported, only float32, bfloat16, float16 and"
            " float64: pass dtype=… after you have removed the field"
        )
    return dtype


def _shards(path: Path) -> dict[Path, set[str]]:
    """Returns a dict: file → names of the tensors that the index lists for the file. A model in a
    single file has no index, so the set of names is empty."""
    if (single := path / "model.safetensors").is_file():
        return {single: set()}
    if not (path / INDEX).is_file():
        if gguf := sorted(path.glob("*.gguf")):
            raise ValueError(f"{path} has no safetensors files: pass the path of {gguf[0].name}")
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
    """Yields the stored name, shape and dtype of each tensor in a file. Raises ValueError if a
    tensor in `listed` is not in the file."""
    with _open_safetensors(file) as tensors:
        stored_names = set(tensors.keys())
        if absent := sorted(listed - stored_names):
            raise ValueError(
                f"{file}: tensor {absent[0]} is missing, but {INDEX} lists it: download it again"
            )
        for stored_name in sorted(stored_names):
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
