"""What loading a model needs besides its file: where it goes, in which dtype, with what progress;
and a checkpoint without a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from gemma_fast.checkpoint.base import Checkpoint
from gemma_fast.config import GemmaConfig
from gemma_fast.kernels.attention import HEAD_DIMS


def track_tensors(tensors: Mapping[str, Tensor], label: str) -> Iterable[str]:
    """The names, one by one, with a progress bar where stderr is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    hidden = not console.is_terminal
    return track(list(tensors), label, console=console, disable=hidden, transient=True)


def refuse_head_dim(config: GemmaConfig, device: torch.device) -> None:
    d = config.head_dim
    if device.type == "cuda" and d not in HEAD_DIMS:
        raise ValueError(f"head_dim={d}: the kernels take one of {HEAD_DIMS}; use device='cpu'")


def refuse_overflow(config: GemmaConfig, dtype: torch.dtype) -> None:
    if config.model_type == "gemma3" and dtype == torch.float16:
        raise ValueError(
            "Gemma 3's residual stream passes 65,504 and overflows float16: use bfloat16 or float32"
        )


def pick_device(
    device: torch.device | str | None, device_map: str | Mapping[str, Any] | None
) -> torch.device:
    if isinstance(device_map, Mapping):
        if list(device_map) != [""]:
            raise ValueError(
                f"device_map {dict(device_map)}: the model runs on one device, {{'': …}}"
            )
        device_map = device_map[""]
    asked: Any = device if device is not None else device_map
    if asked is None or asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        picked = torch.device(asked)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {asked!r} is unknown to PyTorch: {error}") from error
    if picked.type not in ("cpu", "cuda"):
        raise ValueError(f"device {picked} is not supported: only cpu and cuda")
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ValueError(f"device {picked} was asked for, but this PyTorch sees {found} CUDA GPUs")
    return picked


def pick_dtype(
    dtype: torch.dtype | str, checkpoint: Checkpoint, device: torch.device
) -> torch.dtype:
    if dtype == "auto":
        quantized = torch.bfloat16 if device.type == "cuda" else torch.float32
        return torch.float32 if checkpoint.dtype == torch.float64 else checkpoint.dtype or quantized
    picked = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if picked not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype {dtype!r} is not one of auto, float32, bfloat16, float16")
    return picked
