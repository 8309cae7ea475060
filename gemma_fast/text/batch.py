"""Defines Encoding, the tokenizer's result. `pack` creates it from ids, with padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
import torch
from torch import Tensor

PADS: dict[str, Any] = {  # values for padding
    "attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1, "offset_mapping": (0, 0),
    "assistant_masks": 0,
}  # fmt: skip
TENSORS: dict[str, Any] = {"pt": torch.tensor, "np": np.array}
SIDES = ("left", "right")
PADDING = (True, False, None, "longest", "max_length", "do_not_pad")


class Encoding(dict[str, Any]):
    """Stores `input_ids`, `attention_mask` (1: token, 0: padding) and the other requested columns,
    as items and as attributes.

    encodings  a tokenizers.Encoding for each text, without padding, with offsets and the like;
               `encoding[0]` is encodings[0]. None for a chat and after `pad`
    """

    encodings: list[tokenizers.Encoding] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"an Encoding has no {name!r}, only {', '.join(self)}; encodings[i], a"
                " tokenizers.Encoding, has more"
            ) from None

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int) or (isinstance(key, slice) and self.encodings):
            return self._encoding(key)
        if isinstance(key, slice):
            return {name: value[key] for name, value in self.items()}
        return super().__getitem__(key)

    def _encoding(self, row: Any) -> Any:
        if self.encodings is None:
            raise KeyError("only the result of tokenizer(text) has an encoding for each text")
        return self.encodings[row]

    @property
    def data(self) -> dict[str, Any]:
        return dict(self)

    @property
    def is_fast(self) -> bool:
        return self.encodings is not None

    def tokens(self, batch_index: int = 0) -> list[str]:
        """Returns the tokens of a text, without padding."""
        return self._encoding(batch_index).tokens

    def char_to_token(self, batch_or_char: int, char: int | None = None) -> int | None:
        """Returns the position of the token that contains a character, without padding."""
        row, char = (0, batch_or_char) if char is None else (batch_or_char, char)
        return self._encoding(row).char_to_token(char)

    def token_to_chars(self, batch_or_token: int, token: int | None = None) -> Any:
        """Returns start and stop of a token's characters in the text."""
        row, token = (0, batch_or_token) if token is None else (batch_or_token, token)
        return self._encoding(row).token_to_chars(token)

    def to(self, device: torch.device | torch.dtype | str | int, **options: Any) -> Encoding:
        """Returns a copy with the tensors on `device`. Does not change lists. Accepts a dtype, as
        transformers does, but keeps ids as integers. options  of `Tensor.to`"""
        options.pop("dtype", None)
        if isinstance(device, torch.dtype):
            return self._copy(self)
        return self._copy(
            {k: v.to(device, **options) if isinstance(v, Tensor) else v for k, v in self.items()}
        )

    def convert_to_tensors(
        self, tensor_type: str | None = None, prepend_batch_axis: bool = False
    ) -> Encoding:
        """Converts lists to tensors ("pt") or arrays ("np"), in place."""
        for name, value in self.items() if tensor_type else ():
            rows = [value] if prepend_batch_axis else value
            if not isinstance(value, Tensor | np.ndarray):
                self[name] = TENSORS[check_tensors(tensor_type)](rows)
        return self

    def _copy(self, items: Mapping[str, Any]) -> Encoding:
        copy = Encoding(items)
        copy.encodings = self.encodings
        return copy


def check_side(name: str, side: Any) -> None:
    if side not in SIDES:
        raise ValueError(f'{name} must be "left" or "right", not {side!r}')


def check_tensors(return_tensors: Any) -> str:
    """Returns "pt" or "np". Raises ValueError for other values."""
    for name in TENSORS:
        if return_tensors == name:  # also transformers' TensorType.PYTORCH
            return name
    raise ValueError(
        f'return_tensors must be None, "pt" or "np", not {return_tensors!r}: convert the lists'
    )


def pack(
    rows: Sequence[list[int]],
    pad_token_id: int,
    return_tensors: str | None,
    padding: bool | str | None,
    flat: bool,
    *,
    max_length: int | None = None,
    pad_to_multiple_of: int | None = None,
    padding_side: str = "left",
    columns: Mapping[str, Sequence[list]] | None = None,
) -> Encoding:
    """Returns an Encoding of `rows`, the ids of each text, and of `columns`, which have a value for
    each id. Without `columns` it has an attention mask.

    padding  True or "longest": to the longest row; "max_length": to max_length
    flat     there is one row, and without `return_tensors` each column contains that row's values

    Raises ValueError if `return_tensors` is set for rows of different lengths without `padding`.
    """
    if padding not in PADDING:
        raise ValueError(f'padding must be a bool, "longest" or "max_length", not {padding!r}')
    check_side("padding_side", padding_side)
    lengths = [len(row) for row in rows]
    if padding in (True, "longest"):
        max_length = max(lengths, default=0)
    target = max_length if padding not in (False, None, "do_not_pad") else None
    if target is not None and pad_to_multiple_of:
        target = -(-target // pad_to_multiple_of) * pad_to_multiple_of
    pads = [max((target or 0) - length, 0) for length in lengths]
    if return_tensors is not None:
        check_tensors(return_tensors)
        if len({length + pad for length, pad in zip(lengths, pads, strict=True)}) != 1:
            raise ValueError(
                f"texts of {lengths} tokens do not fit one tensor: pass padding=True"
                if rows
                else "no texts were given: pass at least one to get a tensor"
            )
    if columns is None:
        columns = {"attention_mask": [[1] * length for length in lengths]}
    result = Encoding()
    for name, column in {"input_ids": rows, **columns}.items():
        fill = PADS.get(name, pad_token_id)
        padded = [
            [fill] * n + row if padding_side == "left" else row + [fill] * n
            for n, row in zip(pads, column, strict=True)
        ]
        result[name] = padded[0] if flat and not return_tensors else padded
    return result.convert_to_tensors(return_tensors)
