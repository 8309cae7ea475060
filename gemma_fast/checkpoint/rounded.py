"""Packs a checkpoint's weights in 8 or 4 bits while they are read.

A weight is rounded in groups of neighboring columns: weight ≈ scale * q, with an integer q and a
scale in float16 per group.

    int8   q is -127 … 127, and scale is the group's largest |weight| / 127. A group has 128
           columns, or fewer if 128 does not divide the row
    int4   q is -8 … 7, and a group has 32 columns. The scale is searched: it is the best of
           several, and then fitted to its q by least squares

Only matrices are packed, not norms, and not the routers of a mixture of experts: a small error can
change which experts a token uses.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from gemma_fast.checkpoint.base import Checkpoint
from gemma_fast.checkpoint.experts import ROUTER
from gemma_fast.kernels.packed import PackedRows, Packing

BITS = {"int8": 8, "int4": 4, "none": 16}
GROUPS = {8: (128, 64, 32, 16), 4: (32,)}
# Candidates for the q of the group's largest |weight|. More candidates lower the squared error by
# less than 0.5 %: benchmarks/LOG.md.
LARGEST = (-8.75, -8.2, -7.6, -7.0, 7.3)
BLOCK = 1 << 18  # weights that are rounded at once on a CPU, few enough for its cache
READ = 1 << 22  # weights that are unpacked at once
TINY, NORMAL = 2.0**-24, 2.0**-14  # smallest positive and smallest normal float16


def with_quantize(
    checkpoint: Checkpoint, quantize: str | None, device: torch.device | str = "cpu"
) -> Checkpoint:
    """Returns the checkpoint with weights packed as the option `quantize` of from_pretrained says.

    device: where weights are rounded. The same device gives the same values in every run.
    """
    check_quantize(quantize)
    return checkpoint if quantize is None else RoundedCheckpoint(checkpoint, BITS[quantize], device)


def check_quantize(quantize: str | None) -> None:
    """Raises ValueError unless it is None or a key of BITS."""
    if quantize not in (None, *BITS):
        raise ValueError(
            f"quantize={quantize!r} is not one of 'int8', 'int4', 'none' (unpack the weights) and"
            " None (as they are in the checkpoint)"
        )


class RoundedCheckpoint(Checkpoint):
    """A checkpoint whose weights have at most `bits` bits: 8 or 4. With 16 bits none is packed.

    A weight that is packed with more bits is unpacked and rounded; one with as many or fewer stays
    as it is. So does, with a warning, a weight whose rows do not divide into groups. A weight that
    is copied to a tensor has the values of the packed one.
    """

    def __init__(
        self, checkpoint: Checkpoint, bits: int, device: torch.device | str = "cpu"
    ) -> None:
        self.checkpoint, self.bits, self.rounding_device = checkpoint, bits, torch.device(device)
        self.config, self.path, self.shapes = checkpoint.config, checkpoint.path, checkpoint.shapes
        self.dtype, self.generation_config = checkpoint.dtype, checkpoint.generation_config
        self.tensors, self.device = checkpoint.tensors, checkpoint.device
        self.packings: dict[str, Packing | None] = {}
        self.rounded: set[str] = set()
        if bits == 16:
            return
        unfit = []
        for name, shape in self.shapes.items():
            stored = self.packings[name] = checkpoint.packing(name)
            if len(shape) != 2 or name.endswith(ROUTER):
                continue
            if stored is not None and stored.bits <= bits:
                continue
            groups = [group for group in GROUPS[bits] if shape[1] % group == 0]
            if groups:
                self.packings[name] = Packing(bits, groups[0], False, torch.float16)
                self.rounded.add(name)
            else:
                unfit.append(name)
        if unfit:
            warnings.warn(
                f"{self.path}: {len(unfit)} of its weights are not packed in {bits} bits, because"
                f" {GROUPS[bits][-1]} does not divide the length of their rows: {unfit[0]} has rows"
                f" of {self.shapes[unfit[0]][1]}",
                stacklevel=3,
            )

    def packing(self, name: str) -> Packing | None:
        return self.packings.get(name)

    def packed_rows(self, name: str, start: int, stop: int) -> PackedRows:
        if name not in self.rounded:
            return self.checkpoint.packed_rows(name, start, stop)
        packing = self.packings[name]
        assert packing is not None
        x = self.checkpoint.rows(name, start, stop, self.rounding_device)
        cpu = x.device.type == "cpu"
        step = max(BLOCK // x.shape[1], 1) if cpu else len(x)
        try:
            rounded = [
                round_groups(part.float().unflatten(1, (-1, packing.group)), packing.bits)
                for part in x.split(step)
            ]
        except ValueError as error:
            raise ValueError(f"{self.path}: tensor {name}: {error}") from error
        values, scale = (torch.cat(parts) for parts in zip(*rounded, strict=True))
        return PackedRows(values, scale, None)

    def rows(self, name: str, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        if name not in self.rounded:
            return self.checkpoint.rows(name, start, stop, device)
        values, scale, _ = self.packed_rows(name, start, stop)
        groups = values.float().unflatten(1, (scale.shape[1], -1))  # [rows, dim / group, group]
        return (groups * scale.float()[..., None]).flatten(1).to(device)

    def _read(self, name: str, out: Tensor) -> None:
        if name not in self.rounded:
            self.checkpoint.copy(name, out)
            return
        step = max(READ // out.shape[1], 1)
        for start in range(0, len(out), step):
            out[start : start + step] = self.rows(name, start, start + step, out.device)


def round_groups(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Returns the integers :: [rows, dim], int8, and the scales :: [rows, groups], float16.

    x :: [rows, groups, group], float32
    """
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)  # [rows, groups, 1]
    peak = torch.where(-low > high, low, high)
    if not peak.isfinite().all():
        raise ValueError("a weight is NaN or infinite: download or convert the model again")
    limits = (-127, 127) if bits == 8 else (-8, 7)
    scale = _half(peak.abs() / 127 if bits == 8 else _search(x, peak))
    if not scale.isfinite().all():
        raise ValueError(
            f"a weight of {peak.abs().max():.3g} is too large for scales in float16: load the model"
            " with quantize='none'"
        )
    values = _divide(x, scale).round_().clamp_(*limits)
    if bits == 4:  # fit the scale to the integers that the rounded scale gives
        scale = _half(_fit(x, values)[0])
        values = _divide(x, scale).round_().clamp_(*limits)
    return values.to(torch.int8).flatten(1), scale.squeeze(-1).half()


def _search(x: Tensor, peak: Tensor) -> Tensor:
    """Returns the scales :: [rows, groups, 1] of least squared error among those that give the
    largest |weight| of a group one of the values LARGEST."""
    best, scale = torch.full_like(peak, -1), torch.zeros_like(peak)
    for largest in LARGEST:
        fitted, gain = _fit(x, _divide(x, peak / largest).round_().clamp_(-8, 7))
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, fitted, scale)
    return scale


def _fit(x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the scales of least squared error for these integers, and how much they reduce the
    squared error: (x · q)² / q²."""
    xq = (x * q).sum(-1, keepdim=True)
    qq = q.square().sum(-1, keepdim=True).clamp_(min=1)
    return xq / qq, xq.square() / qq


def _half(scale: Tensor) -> Tensor:
    """Returns the scales rounded to float16, as float32.

    Subnormal scales are rounded up: rounded to the nearest, a scale could become half as large or
    0, and the group's largest weight would not fit.
    """
    size = scale.abs()
    up = (size / TINY).ceil_() * TINY
    return torch.where(size < NORMAL, up, size.half().float()).copysign(scale)


def _divide(x: Tensor, scale: Tensor) -> Tensor:
    return x * torch.where(scale == 0, 0, 1 / scale)
