"""open_checkpoint: a path or a hub id → its Checkpoint, checked."""

from __future__ import annotations

import os

from gemma_fast.checkpoint.base import Checkpoint
from gemma_fast.checkpoint.hub import resolve
from gemma_fast.checkpoint.safetensors import SafetensorsCheckpoint


def open_checkpoint(name_or_path: str | os.PathLike[str]) -> Checkpoint:
    """Open and check a directory of safetensors, a .gguf file, or a model on the Hugging Face Hub.

    ValueError: something in it is malformed or unexpected. Other errors: see `hub.resolve`.
    """
    path = resolve(name_or_path)
    checkpoint: Checkpoint
    if path.is_dir():
        checkpoint = SafetensorsCheckpoint(path)
    else:
        from gemma_fast.checkpoint.gguf import GGUFCheckpoint

        checkpoint = GGUFCheckpoint(path)
    checkpoint.check()
    return checkpoint
