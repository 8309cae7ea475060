"""Opens a directory of safetensors files that transformers saved."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_fast.checkpoint.base import EMBEDDING, HEAD, FileCheckpoint, one_thread, parse_content
from gemma_fast.checkpoint.compressed import find_weights, warn_of_computed, warn_of_unpacked
from gemma_fast.checkpoint.compressed_weight import CompressedWeight, Part
from gemma_fast.checkpoint.config_json import config_from_json, dtype_name
from gemma_fast.checkpoint.experts import ExpertRows
from gemma_fast.checkpoint.hub import read_json
from gemma_fast.checkpoint.names import text_name, warn_of_skipped
from gemma_fast.checkpoint.quantization_config import (
    Quantization,
    other_method,
    quantization_of,
    refusal,
    without_quantization,
)  # fmt: skip
from gemma_fast.checkpoint.safetensors_reader import TYPES, read_header, read_rows
from gemma_fast.kernels.packed import PackedRows, Packing

INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"  # transformers applies an adapter that it finds beside a model
MODELOPT = "hf_quant_config.json"  # names the quantization of older files of modelopt
ELEMENTS = 1 << 22  # of a weight that are read at once
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
        self.quantization = _quantization(config_file, content)
        content = without_quantization(content)
        self.config = parse_content(
            config_file, partial(config_from_json, source=str(config_file)), content
        )
        self.generation_config = read_json(generation_file) if generation_file.is_file() else {}

        found: list[str] = []
        for file, listed in _shards(path).items():
            parts = read_header(file)
            if absent := sorted(listed - {part.name for part in parts}):
                raise ValueError(
                    f"{file}: tensor {absent[0]} is missing, but {INDEX} lists it: download it"
                    " again"
                )
            found += [part.name for part in parts]
            for part in parts:
                if (name := text_name(part.name)) is not None:
                    self.add(name, part.shape, file, part)
        warn_of_skipped(path, found)
        self._join_parts()
        self.dtype = _dtype(config_file, dtype_name(content), self.stored)

    def check(self) -> None:
        super().check()
        if self.quantization is not None:
            warn_of_computed(self.path, self.quantization.computed)

    def packing(self, name: str) -> Packing | None:
        weight = self.stored[name]
        return weight.packing if isinstance(weight, CompressedWeight) else None

    def warn_of_unpacked(self) -> None:
        weights = [x for x in self.stored.values() if isinstance(x, CompressedWeight)]
        warn_of_unpacked(self.path, weights)

    def packed_rows(self, name: str, start: int, stop: int) -> PackedRows:
        with one_thread():
            return self.stored[name].packed_rows(start, stop)

    def _join_parts(self) -> None:
        """Replaces the tensors in which a quantized weight is stored by the weight. Raises
        ValueError for dtypes that are not supported."""
        parts: dict[str, Part] = dict(self.stored)
        for name, part in parts.items():
            if method := other_method(name):
                raise refusal(f"{part.file}: tensor {part.name} of {method}", method)
        weights, used = find_weights(parts, self.quantization, read_rows)
        for name in used:
            self._drop(name)
        for name, weight in weights.items():
            self.add(name, weight.shape, weight.values.file, weight)
        for name, part in parts.items():
            if name not in used and part.dtype not in DTYPES:
                raise _unsupported(part)

    def _split(self, stored: Part, rows: ExpertRows) -> Part:
        if stored.dtype not in DTYPES:
            raise _unsupported(stored)
        _, height, columns = stored.shape
        row = rows.expert * height + rows.start
        offset = stored.offset + row * columns * TYPES[stored.dtype].itemsize
        return stored._replace(shape=rows.shape, offset=offset)

    def _read(self, name: str, out: Tensor) -> None:
        step = max(ELEMENTS // math.prod(out.shape[1:]), 1)
        stored = isinstance(self.stored[name], Part)
        for start in range(0, len(out), step):
            rows = self._rows(name, start, start + step)
            with one_thread() if stored else nullcontext():
                out[start : start + step] = rows

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        weight = self.stored[name]
        if isinstance(weight, Part):
            return read_rows(weight, start, stop)
        return weight.unpacked_rows(start, stop)


def _unsupported(part: Part) -> ValueError:
    return part.error(
        f"has dtype {part.dtype}, which is not one of {', '.join(DTYPES)}: load the model with"
        " transformers, or convert the weights"
    )


def _quantization(config_file: Path, content: dict[str, Any]) -> Quantization | None:
    quantization = parse_content(
        config_file, partial(quantization_of, source=str(config_file)), content
    )
    if quantization is None and (other := config_file.with_name(MODELOPT)).is_file():
        raise refusal(f"{other}: quantization by modelopt", "modelopt")
    return quantization


def _dtype(
    config_file: Path, named: str | None, stored: Mapping[str, Part | CompressedWeight]
) -> torch.dtype | None:
    """Returns the dtype that the config names, or else that of the embedding or the head."""
    if named is None:
        names = [name for name in (EMBEDDING, HEAD) if name in stored]
        return DTYPES[stored[names[0]].dtype] if names else None
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
