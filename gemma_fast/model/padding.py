"""Padding of a batch, as callers describe it: attention_mask and position_ids."""

from __future__ import annotations

import torch
from torch import Tensor


def left_padding(mask: Tensor) -> Tensor:
    """mask :: [b, columns], bool, False for padding → each row's first real column :: [b]; of a row
    without one, all columns. ValueError: padding between real columns."""
    columns = mask.shape[1]
    column = torch.arange(columns, device=mask.device)
    count = mask.sum(1, keepdim=True)
    padding = torch.where(count > 0, mask.int().argmax(1, keepdim=True), columns)
    if not torch.equal(mask, (column >= padding) & (column < padding + count)):
        raise ValueError("attention_mask has holes: only padding on one side is supported")
    return padding.squeeze(1)


def check_shape(name: str, given: Tensor, like: Tensor) -> Tensor:
    """`given` on `like`'s device. ValueError: it is not a tensor of like's shape."""
    shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
    if shape != like.shape:
        raise ValueError(f"{name} must be a tensor of {tuple(like.shape)}, not {shape}")
    return given.to(like.device)


def check_position_ids(given: Tensor, expected: Tensor, real: Tensor) -> None:
    """ValueError unless `given` has the positions :: [b, t] that are expected of real tokens."""
    given = check_shape("position_ids", given, expected)
    if not torch.equal(given[real].long(), expected[real]):
        raise ValueError(
            "position_ids must count on from the cache, padding left out: "
            f"expected {expected.tolist()}, got {given.tolist()}"
        )
