"""Defines Encoding, the tokenizer's result. `pack` creates it from ids, with left padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Encoding(dict[str, Any]):
    """Stores `input_ids` and `attention_mask` (1: token, 0: padding) as items and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"an Encoding has no {name!r}, only {', '.join(self)}") from None

    def to(self, device: torch.device | torch.dtype | str) -> Encoding:
        """Returns a copy with the tensors on `device`. Does not change lists. Accepts a dtype, as
        transformers does, but keeps ids as integers."""
        if isinstance(device, torch.dtype):
            return Encoding(self)
        return Encoding({k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.items()})


def pack(
    rows: Sequence[list[int]],
    pad_token_id: int,
    return_tensors: str | None,
    padding: bool | str,
    flat: bool,
) -> Encoding:
    """Returns an Encoding of `rows`, the ids of each text. If `flat` is True, there is one row, and
    without `return_tensors` the Encoding contains its ids instead of a list of rows. Raises
    ValueError if `return_tensors` is set for rows of different lengths without `padding`."""
    if return_tensors not in (None, "pt") or padding not in (True, False, "longest"):
        raise ValueError(
            f'return_tensors must be None or "pt", and padding a bool or "longest", not'
            f" {return_tensors!r} and {padding!r}"
        )
    lengths = [len(row) for row in rows]
    if return_tensors and len(set(lengths)) != 1 and not (padding and rows):
        raise ValueError(
            f"texts of {lengths} tokens do not fit one tensor: pass padding=True"
            if rows
            else "no texts were given: pass at least one to get a tensor"
        )
    pads = [max(lengths) - length if padding else 0 for length in lengths]
    ids: Any = [[pad_token_id] * n + row for n, row in zip(pads, rows, strict=True)]
    mask: Any = [[0] * n + [1] * len(row) for n, row in zip(pads, rows, strict=True)]
    if return_tensors:
        ids, mask = torch.tensor(ids, dtype=torch.int64), torch.tensor(mask)
    elif flat:
        ids, mask = ids[0], mask[0]
    return Encoding(input_ids=ids, attention_mask=mask)
