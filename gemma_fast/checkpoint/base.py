"""A checkpoint on disk → named tensors: a directory of safetensors, a .gguf file, or a hub id.

    checkpoint = open_checkpoint("google/gemma-3-270m")
    checkpoint.config, checkpoint.dtype, checkpoint.shapes
    checkpoint.copy("model.norm.weight", out)

Everything in a file is untrusted. Opening reads headers only, and compares every name, shape and
dtype with what the config asks for, before anything large is allocated; then tensors are read one
at a time, straight into where they belong.
"""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gemma_fast.checkpoint.config_files import config_from_json
from gemma_fast.config import GemmaConfig

if TYPE_CHECKING:
    from gemma_fast.checkpoint.gguf_reader import GGUFFile

PICKLES = (".bin", ".pth", ".pt", ".ckpt")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]
MAX_JSON = 16 << 20  # bytes; the index of the largest Gemma takes 0.1 MB

INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
MULTIMODAL_PREFIX = re.compile(r"^(language_model\.model|model\.language_model)\.")
NOT_TEXT = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
TIED_HEAD = re.compile(r"((model\.)?language_model\.)?lm_head\.weight$")


class Checkpoint(ABC):
    """Tensors that are still on disk, and what is known about them.

    config             what the file says it holds
    dtype              what its tensors are stored in; None for GGUF, where each has its own
    path               the directory or the file
    generation_config  the content of generation_config.json, {} when there is none
    shapes             name → shape of each tensor of the text model, named as transformers does
    files              name → the file that holds it
    """

    config: GemmaConfig
    dtype: torch.dtype | None = None
    path: Path
    generation_config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, Path]

    def check(self) -> None:
        """ValueError, naming file and tensor, unless the tensors are those the config asks for."""
        expected = self.config.tensor_shapes()
        for name, shape in expected.items():
            if name not in self.shapes:
                raise ValueError(f"{self.path}: tensor {name} is missing")
            if self.shapes[name] != shape:
                raise ValueError(
                    f"{self.files[name]}: tensor {name} has shape {self.shapes[name]},"
                    f" but the config asks for {shape}"
                )
        for name in self.shapes:
            if name not in expected:
                raise ValueError(f"{self.files[name]}: tensor {name} is unknown to the config")

    @torch.no_grad()
    def copy(self, name: str, out: Tensor) -> None:
        """Read one tensor into `out`: of the same shape, of any float dtype, on any device.

        On the host it takes no more than the tensor as stored and a block of it converted.
        """
        assert out.shape == self.shapes[name], f"{name}: {out.shape=} is not {self.shapes[name]}"
        self._read(name, out)

    @abstractmethod
    def _read(self, name: str, out: Tensor) -> None: ...


class SafetensorsCheckpoint(Checkpoint):
    """A directory as transformers saves it. Of a multimodal Gemma 3, the text model is taken."""

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
                        f"{file}: tensor {name} has dtype {dtype}, not one of {allowed}"
                    )
                if name == "model.embed_tokens.weight":
                    self.dtype = DTYPES[dtype]
                self.shapes[name], self.files[name] = shape, file
                self._stored_names[name] = stored_name

    def _read(self, name: str, out: Tensor) -> None:
        # Opened anew for each tensor: closing lets go of the pages that were read.
        with _open_safetensors(self.files[name]) as tensors:
            out.copy_(tensors.get_tensor(self._stored_names[name]))


def open_checkpoint(name_or_path: str | os.PathLike[str]) -> Checkpoint:
    """Open and check a directory of safetensors, a .gguf file, or a model on the Hugging Face Hub.

    Raises ValueError for anything malformed or unexpected in it, and what `resolve` raises.
    """
    path = resolve(name_or_path)
    checkpoint: Checkpoint
    if path.is_dir():
        checkpoint = SafetensorsCheckpoint(path)
    else:
        from gemma_fast.checkpoint.gguf_reader import GGUFCheckpoint

        checkpoint = GGUFCheckpoint(open_gguf(path))
    checkpoint.check()
    return checkpoint


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """A GGUF file's `.metadata` and `.tensors`. ValueError where malformed; needs extra `gguf`."""
    from gemma_fast.checkpoint.gguf_reader import GGUFFile

    return GGUFFile(path)


def resolve(name_or_path: str | os.PathLike[str], patterns: Sequence[str] = HUB_FILES) -> Path:
    """The directory or .gguf file meant: the path itself, or the download of a hub id, of which
    it fetches the files that match `patterns`.

    Raises ValueError for a pickle, which runs code when it is read, and for other files; OSError
    where a hub id cannot be downloaded (FileNotFoundError: nothing is there).
    """
    if not name_or_path or not isinstance(name_or_path, str | os.PathLike):
        raise ValueError(f"{name_or_path!r} is no path and no hub id")
    name, path = os.fspath(name_or_path), Path(name_or_path)
    if path.is_dir():
        files = sorted(path.iterdir())
        pickles = [file for file in files if file.suffix in PICKLES]
        if pickles and not any(file.suffix == ".safetensors" for file in files):
            path = pickles[0]
        else:
            return path
    if path.suffix in PICKLES:
        raise ValueError(f"{path} is a pickle, which can run code: convert it to safetensors")
    if path.suffix == ".gguf" and path.is_file():
        return path
    if path.exists():
        raise ValueError(f"{path} is neither a directory of safetensors nor a .gguf file")
    if HUB_ID.fullmatch(name) and path.suffix not in (".gguf", ".safetensors"):
        return _download(name, patterns)
    raise FileNotFoundError(f"{path} does not exist, and is no hub id (owner/name)")


def _download(hub_id: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:  # what the library's errors derive from
        raise OSError(
            f"{hub_id} is not a directory here, and could not be fetched from the Hugging Face Hub"
            f" ({type(error).__name__}). If it is gated, accept its terms on"
            f" https://huggingface.co/{hub_id} and run `hf auth login`; offline, give the path of"
            " a local copy."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError, naming the file, if there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path} is {path.stat().st_size} bytes long, above {MAX_JSON}")
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, not a {type(content).__name__}")
    return content


def parse_config(
    path: Path, parse: Callable[[dict[str, Any]], GemmaConfig], content: dict[str, Any]
) -> GemmaConfig:
    """`parse(content)`; its ValueError names the file."""
    try:
        return parse(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _shards(path: Path) -> dict[Path, set[str]]:
    """The files that hold a model's tensors, each with the names that the index says it has."""
    if (single := path / "model.safetensors").is_file():
        return {single: set()}
    if not (path / INDEX).is_file():
        found = ", ".join(sorted(file.name for file in path.glob("*.safetensors"))) or "none"
        raise ValueError(f"{path} has neither model.safetensors nor {INDEX} (shards: {found})")
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path / INDEX} has no weight_map")

    shards: dict[Path, set[str]] = {}
    for name, shard in weight_map.items():
        # A bare name cannot leave the directory. It may be a symlink: the Hub's cache is made so.
        if not isinstance(shard, str) or not SHARD.fullmatch(shard):
            raise ValueError(f"{path / INDEX}: {shard!r} is not the name of a .safetensors file")
        shards.setdefault(path / shard, set()).add(name)
    for file in shards:
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist, which {INDEX} lists")
    return shards


def _header(file: Path, listed: set[str]) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Stored name, shape and dtype of each tensor of the text model in a file."""
    with _open_safetensors(file) as tensors:
        stored_names = set(tensors.keys())
        if absent := sorted(listed - stored_names):
            raise ValueError(f"{file}: tensor {absent[0]} is missing, though in {INDEX}")
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
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from error
