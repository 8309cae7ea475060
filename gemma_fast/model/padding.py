"""Checks attention_mask and position_ids, which describe the padding of a batch."""

from __future__ import annotations

import torch
from torch import Tensor


def left_padding(mask: Tensor) -> Tensor:
    """Returns the number of padding columns :: [b] on the left of each row.

    mask :: [b, columns], bool, False for padding. Raises ValueError if a row has padding between
    real tokens.
    """
    columns = mask.shape[1]
    column = torch.arange(columns, device=mask.device)
    count = mask.sum(1, keepdim=True)
    padding = torch.where(count > 0, mask.int().argmax(1, keepdim=True), columns)
    if not torch.equal(mask, (column >= padding) & (column < padding + count)):
        raise ValueError("attention_mask has holes: only padding on one side is supported")
    return padding.squeeze(1)


def check_shape(name: str, given: Tensor, like: Tensor) -> Tensor:
    """Returns `given` on the device of `like`. Raises ValueError unless `given` is a tensor of the
    shape of `like`."""
    shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
    if shape != like.shape:
        raise ValueError(f"{name} must be a tensor of shape {tuple(like.shape)}, not {shape}")
    return given.to(like.device)


def check_position_ids(given: Tensor, expected: Tensor, real: Tensor) -> None:
    """Raises ValueError unless given :: [b, t] equals expected :: [b, t] where real :: [b, t] is
    True."""
    given = check_shape("position_ids", given, expected)
    if not torch.equal(given[real].long(), expected[real]):
        raise ValueError(
            "position_ids must continue the cache's positions and must not count padding: "
            f"expected {expected.tolist()}, got {given.tolist()}"
        )
