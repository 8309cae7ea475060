"""Opens the checkpoint of a path or a hub id, and checks it against its config."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from gemma_fast.checkpoint.base import Checkpoint, FileCheckpoint, on_cpu
from gemma_fast.checkpoint.hub import resolve
from gemma_fast.checkpoint.safetensors import SafetensorsCheckpoint


def open_checkpoint(
    name_or_path: str | os.PathLike[str], download: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Opens and checks a directory of safetensors, a .gguf file or a model on the Hugging Face Hub.

    download: keywords of huggingface_hub.snapshot_download, for a model on the hub

    Raises ValueError if a file is malformed or a tensor does not match the config, and the errors
    of `hub.resolve`.
    """
    path = resolve(name_or_path, download=download)
    checkpoint: FileCheckpoint
    with on_cpu():
        if path.is_dir():
            checkpoint = SafetensorsCheckpoint(path)
        else:
            from gemma_fast.checkpoint.gguf import GGUFCheckpoint

            checkpoint = GGUFCheckpoint(path)
        checkpoint.check()
    return checkpoint
