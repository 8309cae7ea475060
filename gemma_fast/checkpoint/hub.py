"""Finds a model's files in a local path, or downloads them from the Hugging Face Hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PICKLES = (".bin", ".pth", ".pt", ".ckpt")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
# Name of one part of a split GGUF file: stem, number of the part, number of parts.
GGUF_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.ASCII)
HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]
MAX_JSON = 16 << 20  # bytes; the index of a quantized mixture of experts takes 4 MB


def resolve(
    name_or_path: str | os.PathLike[str],
    patterns: Sequence[str] = HUB_FILES,
    download: Mapping[str, Any] | None = None,
) -> Path:
    """Returns the path itself for a directory or a .gguf file. For a hub id, downloads the files
    that match `patterns` and returns their directory.

    download: keywords of huggingface_hub.snapshot_download, such as revision and token

    Raises ValueError for other kinds of file, for example a pickle, which can run code when it is
    read. Raises OSError if the download fails, and FileNotFoundError if the name is neither an
    existing path nor a hub id.
    """
    if not name_or_path or not isinstance(name_or_path, str | os.PathLike):
        raise ValueError(
            f"{name_or_path!r} is neither a path nor a hub id: pass a directory, a .gguf file or an"
            " owner/name"
        )
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
        part = GGUF_PART.fullmatch(path.name)
        if part and int(part[2]) != 1:
            raise ValueError(
                f"{path} is part {int(part[2])} of {int(part[3])} of a model: pass the first part,"
                f" {part[1]}-00001-of-{part[3]}.gguf"
            )
        return path
    if path.exists():
        raise ValueError(
            f"{path} is neither a directory of safetensors nor a .gguf file: pass the model's"
            " directory"
        )
    if HUB_ID.fullmatch(name) and path.suffix not in (".gguf", ".safetensors"):
        return _download(name, patterns, download or {})
    raise FileNotFoundError(f"{path} does not exist, and is not a hub id (owner/name): check it")


def _download(hub_id: str, patterns: Sequence[str], options: Mapping[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns), **options))
    except (OSError, ValueError) as error:  # base classes of huggingface_hub's errors
        raise OSError(
            f"{hub_id} is not a local directory, and its download from the Hugging Face Hub failed"
            f" ({type(error).__name__}). If it is gated, accept its terms on"
            f" https://huggingface.co/{hub_id} and run `hf auth login`; offline, pass the path of"
            " a local copy."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises ValueError, with the path, for other content."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}: pass the directory of a model")
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path} is {path.stat().st_size} bytes long; the limit is {MAX_JSON}")
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must contain a JSON object, not a {type(content).__name__}")
    return content
