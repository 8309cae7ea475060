"""Loads a checkpoint into a model: picks device and dtype, allocates, fuses and copies weights.

model/packing.py chooses which weights stay packed.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor

from gemma_fast.checkpoint.base import Checkpoint, on_cpu, one_thread
from gemma_fast.checkpoint.experts import ROUTER
from gemma_fast.checkpoint.rounded import with_quantize
from gemma_fast.config import GemmaConfig
from gemma_fast.kernels.packed import PackedWeight
from gemma_fast.memory import free_bytes, out_of_memory
from gemma_fast.model.gemma import Gemma
from gemma_fast.model.packing import Packings, multiplies_bf16, pack_weights

Model = TypeVar("Model", bound=Gemma)
PER_LAYER = "embed_tokens_per_layer"  # the weight that can stay in host memory
PACKED = 1 << 22  # elements of a packed weight that are read at once


def load_model(
    cls: type[Model],
    checkpoint: Checkpoint,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    on_host: bool = False,
    quantize: str | None = None,
) -> Model:
    """Returns a model of class `cls` with the checkpoint's config and weights.

    cls      a subclass of Gemma without parameters of its own
    dtype    "auto": the checkpoint's; for GGUF bf16 on a GPU, else float32. For packed weights on a
             CPU that has kernels for them and multiplies bf16: bf16
    device   None: the device of the checkpoint's tensors if they are in memory; otherwise the GPU
             if there is one, else the CPU
    on_host  keep the table of per-layer embeddings (Gemma 4) in pinned host memory, from which a
             GPU reads one row per token. It is also kept there if the weights do not fit the GPU's
             free memory with it, but fit without it. A table that is shared with the checkpoint
             stays where it is
    quantize None: weights that the checkpoint has packed stay packed; "none": they are unpacked;
             "int8", "int4": weights with more bits are rounded, see checkpoint/rounded.py

    `model.parts` lists, for each parameter, the checkpoint's tensors that are stacked in it. The
    parameter shares the memory of these tensors if `_share` finds that possible. Otherwise it is
    allocated and the tensors are copied. All memory is allocated before the first tensor is read.
    """
    config = checkpoint.config
    device = pick_device(checkpoint.device if device is None else device, None)
    checkpoint = with_quantize(checkpoint, quantize, device)
    checkpoint.warn_of_unpacked()
    dtype = model_dtype(dtype, checkpoint, device)
    refuse_overflow(config, dtype)
    refuse_head_dim(config, device, cls.head_dims)
    packings = _packings(checkpoint)
    with torch.device("meta"):
        model = cls(config).to(dtype)
        parts: dict[str, list[str]] = model.parts
        packed = pack_weights(model, packings, device, str(checkpoint.path))
    found = {
        name: None if name in packed else _share(checkpoint, tensors, dtype, device)
        for name, tensors in parts.items()
    }
    shared = {name: weight for name, weight in found.items() if weight is not None}
    empty = {name: x for name, x in model.named_parameters() if name not in shared}
    on_host = device.type == "cuda" and (on_host or fits_without_table(empty, free_bytes(device)))
    with _allocation(checkpoint, empty, dtype, device):
        new = {
            name: allocate(weight, device="cpu", pin_memory=True)
            if on_host and _is_table(name)
            else allocate(weight, device=device)
            for name, weight in empty.items()
        }
    model.load_state_dict(shared | new, assign=True)
    with on_cpu():
        _copy(checkpoint, new, packed, parts)
    return model


def model_dtype(
    dtype: torch.dtype | str, checkpoint: Checkpoint, device: torch.device
) -> torch.dtype:
    """Returns `pick_dtype`'s dtype, or bfloat16 if "auto" can run kernels for packed weights."""
    packed = any(packing is not None for packing in _packings(checkpoint).values())
    if dtype == "auto" and device.type == "cpu" and packed and multiplies_bf16():
        return torch.bfloat16
    return pick_dtype(dtype, checkpoint, device)


def _packings(checkpoint: Checkpoint) -> Packings:
    return {
        name: None if name.endswith(ROUTER) else checkpoint.packing(name)
        for name in checkpoint.shapes
    }


def _is_table(name: str) -> bool:
    return name.partition(".")[0] == PER_LAYER


def _share(
    checkpoint: Checkpoint, names: Sequence[str], dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """Returns one tensor that stacks the named tensors along their first dimension without a copy.

    Returns None if the tensors must be read from a file, converted or moved, or if they are not
    contiguous and adjacent in this order.
    """
    if checkpoint.tensors is None or (checkpoint.dtype, checkpoint.device) != (dtype, device):
        return None
    parts = [checkpoint.tensors[name] for name in names]
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and part.is_contiguous() and part.data_ptr() == end):
            return None
        end += part.nbytes
    rows, rest = sum(len(part) for part in parts), first.shape[1:]
    strides = (math.prod(rest), *first.stride()[1:])
    return first.as_strided((rows, *rest), strides, first.storage_offset())


def fits_without_table(weights: Mapping[str, Tensor], free: float) -> bool:
    """Returns True if the weights need more than `free` bytes, but not without the table of
    per-layer embeddings."""
    size = sum(weight.nbytes for weight in weights.values())
    table = sum(weight.nbytes for name, weight in weights.items() if _is_table(name))
    return size - table <= free < size


def allocate(weight: Tensor, **where: Any) -> Tensor:
    """Returns an empty tensor like a meta tensor. torch.empty_like takes 0.3 s to import sympy."""
    return torch.empty(weight.shape, dtype=weight.dtype, **where)


def _allocation(
    checkpoint: Checkpoint, empty: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> AbstractContextManager[None]:
    """Returns a context in which weights are allocated. If memory runs out, the error message names
    the weights and, if they are read from a file, their size."""
    if checkpoint.tensors is not None:
        return out_of_memory("the copies of fused weights", 0, device, "from_pretrained")
    what = f"{checkpoint.path.name} in {str(dtype).removeprefix('torch.')}"
    size = sum(weight.nbytes for weight in empty.values())
    return out_of_memory(what, size, device, "dtype='bfloat16' or a smaller model")


def _copy(
    checkpoint: Checkpoint,
    weights: Mapping[str, Tensor],
    packed: Mapping[str, PackedWeight],
    parts: Mapping[str, list[str]],
) -> None:
    """Copies each tensor of the checkpoint to its rows of the weight in which it is stacked."""
    targets: dict[str, tuple[Tensor | PackedWeight, int]] = {}  # tensor → weight and first row
    stacked: dict[str, Tensor | PackedWeight] = {**weights, **packed}
    for name, weight in stacked.items():
        row = 0
        for tensor in parts.get(name, ()):  # a packed weight's data and scales are no parts
            targets[tensor] = weight, row
            row += checkpoint.shapes[tensor][0]
    read = checkpoint.tensors is None
    for tensor in _track(targets, f"Reading {checkpoint.path.name}") if read else targets:
        weight, row = targets[tensor]
        rows = checkpoint.shapes[tensor][0]
        if isinstance(weight, Tensor):
            checkpoint.copy(tensor, weight[row : row + rows])
            continue
        step = max(PACKED // weight.shape[1] // 64, 1) * 64
        for start in range(0, rows, step):
            packed_rows = checkpoint.packed_rows(tensor, start, min(start + step, rows))
            try:
                with one_thread():
                    weight.write(row + start, packed_rows)
            except ValueError as error:
                raise ValueError(f"{checkpoint.path}: tensor {tensor}: {error}") from error


def _track(names: Iterable[str], label: str) -> Iterator[str]:
    """Yields the names. Shows a progress bar after a second if stderr is a terminal."""
    names, start = [*names], time.perf_counter()
    left = iter(names)
    for done, name in enumerate(left):
        yield name
        if sys.stderr.isatty() and time.perf_counter() - start > 1:
            from rich.console import Console
            from rich.progress import track

            yield from track(
                left, label, total=len(names), completed=done + 1, console=Console(stderr=True),
                transient=True,
            )  # fmt: skip


def refuse_head_dim(config: GemmaConfig, device: torch.device, head_dims: Sequence[int]) -> None:
    """Raises ValueError if the model is on a GPU and the kernels do not support its head dim."""
    for d in {layer.head_dim for layer in config.layers}:
        if device.type == "cuda" and d not in head_dims:
            raise ValueError(f"head_dim={d}: the kernels need one of {head_dims}; use device='cpu'")


def refuse_overflow(config: GemmaConfig, dtype: torch.dtype) -> None:
    if config.model_type in ("gemma3", "gemma4") and dtype == torch.float16:
        family = config.model_type.replace("gemma", "Gemma ")
        raise ValueError(f"{family}'s residual stream overflows float16: use bfloat16 or float32")


def pick_device(
    device: torch.device | str | None, device_map: str | Mapping[str, Any] | None
) -> torch.device:
    if isinstance(device_map, Mapping):
        others = {k: v for k, v in device_map.items() if (k, v) != (f"model.{PER_LAYER}", "cpu")}
        if list(others) != [""]:
            raise ValueError(
                f"device_map {dict(device_map)}: the model runs on one device, pass {{'': device}};"
                f" only 'model.{PER_LAYER}' may be on 'cpu'"
            )
        device_map = others[""]
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
        raise ValueError(f"device {picked} is not available: PyTorch finds {found} CUDA GPUs")
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
