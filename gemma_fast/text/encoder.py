"""Converts texts to ids and back, with the arguments of transformers' tokenizers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tokenizers
from torch import Tensor

from gemma_fast.compat import check_keywords
from gemma_fast.text.batch import PADS, Encoding, pack
from gemma_fast.text.bos_adder import BosAdder, text_list
from gemma_fast.text.keywords import CALL, DECODE
from gemma_fast.text.settings import NO_MAX_LENGTH

TRUNCATION = (True, False, None, "longest_first", "only_first", "only_second", "do_not_truncate")


class TextEncoder(BosAdder):
    """Encodes and decodes texts."""

    def __call__(
        self,
        text: str | Iterable[str] | None = None,
        text_pair: str | Iterable[str] | None = None,
        text_target: str | Iterable[str] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str | None = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        return_token_type_ids: bool | None = None,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> Encoding:
        """Encodes one text or several.

        Returns an Encoding. It contains lists of ids (one flat list for a str), or int64 tensors
        [b, t] if return_tensors="pt". padding=True or "longest" adds <pad> on `padding_side`;
        truncation=True, or max_length alone, drops ids on `truncation_side`. text_target gives the
        item labels. `others` are keywords of transformers, see keywords.CALL.

        Raises ValueError if tensors are requested for texts of different lengths without padding.
        """
        if tokenizer_kwargs:
            return self(text, text_pair, text_target, **{**others, **tokenizer_kwargs})
        check_keywords("the tokenizer", others, CALL)
        options: dict[str, Any] = {
            "add_special_tokens": add_special_tokens, "padding": padding, "truncation": truncation,
            "max_length": max_length, "pad_to_multiple_of": pad_to_multiple_of,
            "padding_side": padding_side, "return_tensors": return_tensors,
        }  # fmt: skip
        if text_target is not None:
            target = self(text_target, **options)
            if text is None:
                return target
        flat = isinstance(text, str)
        texts = text_list("text", text)
        if truncation is None and max_length is not None and padding is False:
            truncation = True
        length, limit = self._lengths(padding, truncation, max_length, pad_to_multiple_of)
        found = self._encode(texts, self._pairs(text_pair, texts, limit), add_special_tokens, limit)
        columns = self._columns(
            found, return_attention_mask, return_token_type_ids, return_special_tokens_mask,
            return_offsets_mapping,
        )  # fmt: skip
        result = self._pack(
            [e.ids for e in found], columns, flat, return_tensors, padding=padding,
            max_length=length, pad_to_multiple_of=pad_to_multiple_of, padding_side=padding_side,
        )  # fmt: skip
        result.encodings = found
        if return_length:
            rows = [result["input_ids"]] if flat and not return_tensors else result["input_ids"]
            result["length"] = [len(row) for row in rows]
            result.convert_to_tensors(return_tensors)
        if text_target is not None:
            result["labels"] = target["input_ids"]
        return result

    def encode(
        self,
        text: str | Iterable[str],
        text_pair: str | Iterable[str] | None = None,
        add_special_tokens: bool = True,
        **options: Any,
    ) -> Any:
        """Returns the ids of `text`: a list, or with return_tensors="pt" a tensor [1, t]. The
        name of a special token in the text is encoded as that token. options  of a call

        `add_special_tokens` adds <bos> in front, unless the text starts with <bos>. Raises
        ValueError if `text` is not a str or contains half a surrogate pair.
        """
        return self(text, text_pair, add_special_tokens=add_special_tokens, **options).input_ids

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """Returns the tokens of `text`. They contain ▁ for a space."""
        return self(text, pair, add_special_tokens=add_special_tokens, **options).tokens()

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        **others: Any,
    ) -> Any:
        """Returns the text of ids :: [t], or of one id; for ids :: [b, t], a list of texts. Skips
        ids outside the vocabulary."""
        check_keywords("decode()", others, DECODE)
        ids: Any = token_ids["input_ids"] if isinstance(token_ids, Mapping) else token_ids
        row = ids.tolist() if isinstance(ids, Tensor | np.ndarray | np.generic) else ids
        row = [row] if isinstance(row, int) else list(row)
        if row and isinstance(row[0], list | tuple | Tensor | np.ndarray) and not _scalar(row[0]):
            return [self.decode(ids, skip_special_tokens) for ids in row]
        try:
            ids = [token_id if isinstance(token_id, str) else int(token_id) for token_id in row]
            return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError):
            raise ValueError(f"ids must be rows of token ids, not {token_ids!r:.60}") from None

    def batch_decode(
        self, sequences: Iterable[Any], skip_special_tokens: bool = False, **others: Any
    ) -> list[str]:
        """Returns one text per row. sequences :: [b, t], or a list of lists of ids."""
        rows = sequences if isinstance(sequences, Tensor | np.ndarray) else [*sequences]
        texts = self.decode(rows, skip_special_tokens, **others) if len(rows) else []
        return [texts] if isinstance(texts, str) else texts

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> Encoding:
        """Pads ids that are encoded already: an Encoding or a dict with input_ids, or a list of
        them. Items that a call does not return stay as they are."""
        given = encoded_inputs
        if not isinstance(given, Mapping):
            given = {name: [example[name] for example in given] for name in given[0]}
        columns = {name: _rows(value) for name, value in given.items()}
        if "input_ids" not in columns:
            raise ValueError(f"pad() needs input_ids, but the encoding has only {[*columns]}")
        rows = columns.pop("input_ids")
        if any(isinstance(value, Tensor) for value in (given["input_ids"], *given["input_ids"])):
            return_tensors = return_tensors or "pt"
        flat = not (rows and isinstance(rows[0], list))
        if flat:
            rows, columns = [rows], {name: [value] for name, value in columns.items()}
        if return_attention_mask is not False and "attention_mask" not in columns:
            columns["attention_mask"] = [[1] * len(row) for row in rows]
        others = {name: columns.pop(name) for name in [*columns] if name not in PADS}
        length, _ = self._lengths(padding, False, max_length, pad_to_multiple_of)
        result = self._pack(
            rows, columns, flat, return_tensors, padding=padding, max_length=length,
            pad_to_multiple_of=pad_to_multiple_of, padding_side=padding_side,
        )  # fmt: skip
        result.update({k: v[0] if flat and not return_tensors else v for k, v in others.items()})
        return result.convert_to_tensors(return_tensors)

    def _columns(
        self, found: list[tokenizers.Encoding], mask: bool | None, types: bool | None,
        special: bool, offsets: bool,
    ) -> dict[str, list]:  # fmt: skip
        """Returns the requested columns. An argument of None follows `model_input_names`."""
        columns: dict[str, tuple[bool | None, list]] = {
            "attention_mask": (mask, [e.attention_mask for e in found]),
            "token_type_ids": (types, [e.type_ids for e in found]),
            "special_tokens_mask": (special, [e.special_tokens_mask for e in found]),
            "offset_mapping": (offsets, [e.offsets for e in found]),
        }
        return {
            name: rows
            for name, (wanted, rows) in columns.items()
            if (name in self.model_input_names if wanted is None else wanted)
        }

    def _pack(
        self, rows: list[list[int]], columns: Mapping[str, Any], flat: bool,
        return_tensors: str | None, *, padding: Any, padding_side: str | None = None,
        **options: Any,
    ) -> Encoding:  # fmt: skip
        if padding and self.pad_token is None:
            raise ValueError("padding needs a pad token: set pad_token")
        side = padding_side or self.padding_side
        return pack(
            rows, self.pad_token_id, return_tensors, padding, flat, padding_side=side,
            columns=columns, **options,
        )  # fmt: skip

    def _lengths(
        self, padding: Any, truncation: Any, max_length: int | None, multiple: int | None
    ) -> tuple[int | None, int | None]:
        """Returns the length that padding="max_length" pads to, and the limit of truncation."""
        if truncation not in TRUNCATION:
            raise ValueError(f"truncation must be one of {TRUNCATION}, not {truncation!r}")
        if max_length is None and self.model_max_length < NO_MAX_LENGTH:
            max_length = self.model_max_length
        cut = truncation not in (False, None, "do_not_truncate")
        if cut and padding and multiple and max_length and max_length % multiple:
            raise ValueError(
                f"truncation to {max_length} tokens is not a multiple of"
                f" pad_to_multiple_of={multiple}"
            )
        return max_length, max_length if cut else None


def _rows(value: Any) -> Any:
    """Returns tensors and arrays in `value` as lists."""
    if isinstance(value, Tensor | np.ndarray):
        return value.tolist()
    return [_rows(item) for item in value] if isinstance(value, list | tuple) else value


def _scalar(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray) and value.ndim == 0
