"""Opens the checkpoint of a path or a hub id, and checks it against its config."""

from __future__ import annotations

import os

from gemma_fast.checkpoint.base import Checkpoint, FileCheckpoint
from gemma_fast.checkpoint.hub import resolve
from gemma_fast.checkpoint.safetensors import SafetensorsCheckpoint


def open_checkpoint(
    name_or_path: str | os.PathLike[str], local_files_only: bool = False
) -> Checkpoint:
    """Opens and checks a directory of safetensors, a .gguf file or a model on the Hugging Face Hub.
    With local_files_only, a model on the Hub must be in its cache.

    Raises ValueError if a file is malformed or a tensor does not match the config, and the errors
    of `hub.resolve`.
    """
    path = resolve(name_or_path, local_files_only=local_files_only)
    checkpoint: FileCheckpoint
    if path.is_dir():
        checkpoint = SafetensorsCheckpoint(path)
    else:
        from gemma_fast.checkpoint.gguf import GGUFCheckpoint

        checkpoint = GGUFCheckpoint(path)
    checkpoint.check()
    return checkpoint
