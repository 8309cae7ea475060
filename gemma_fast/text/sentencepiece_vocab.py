"""Builds a BPE tokenizer from tokenizer.model, a SentencePiece model.

The file is a protobuf message. Only its pieces and four options are read, so that neither protobuf
nor sentencepiece is needed. Source: sentencepiece_model.proto of SentencePiece.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from gemma_fast.text.gguf_vocab import scored_vocabulary
from gemma_fast.text.scored_merges import NORMAL, ScoredMerges

MAX_BYTES = 8 << 20  # Gemma 3's file takes 5 MB
MAX_FIELDS = 1 << 20  # of all messages; Gemma 3's file has 0.8 million
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
PIECES, TRAINER, NORMALIZER = 1, 2, 3  # fields of the model
PIECE, SCORE, TYPE = 1, 2, 3  # fields of a piece
MODEL_TYPE, UNIGRAM, BPE = 3, 1, 2  # field of the trainer, its default, and Gemma's value
CHARSMAP, DUMMY_PREFIX, EXTRA_WHITESPACES = 2, 3, 4  # fields of the normalizer
# field → wire type, of the model and of the messages in it
MODEL_WIRES = {PIECES: BYTES, TRAINER: BYTES, NORMALIZER: BYTES}
PIECE_WIRES = {PIECE: BYTES, SCORE: FIXED32, TYPE: VARINT}
OPTION_WIRES = {
    TRAINER: {MODEL_TYPE: VARINT},
    NORMALIZER: {CHARSMAP: BYTES, DUMMY_PREFIX: VARINT, EXTRA_WHITESPACES: VARINT},
}


def sentencepiece_vocabulary(path: Path) -> tuple[Backend, ScoredMerges]:
    """Returns the tokenizer, without normalizer and decoder, and the merges that its model still
    lacks. Raises ValueError, with the path, for a malformed file, and for a model with options that
    Gemma's does not have."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path} is {size} bytes long; the limit is {MAX_BYTES}")
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    options: dict[int, dict[int, Any]] = {TRAINER: {}, NORMALIZER: {}}
    count = itertools.count(1)
    try:
        for field, value in _fields(memoryview(path.read_bytes()), MODEL_WIRES, count):
            if field == PIECES:
                piece = dict(_fields(value, PIECE_WIRES, count))
                if PIECE not in piece:
                    raise ValueError(f"piece {len(tokens)} has no text")
                tokens.append(str(piece[PIECE], "utf-8"))
                scores.append(struct.unpack("<f", piece.get(SCORE, bytes(4)))[0])
                types.append(piece.get(TYPE, NORMAL))
            elif field in options:
                options[field].update(_fields(value, OPTION_WIRES[field], count))
        if not tokens:
            raise ValueError("it has no pieces")
    except ValueError as error:
        raise ValueError(
            f"{path} is not a readable SentencePiece model: {error}; download it again, or save"
            " tokenizer.json with transformers.AutoTokenizer"
        ) from error
    _check_options(options[TRAINER], options[NORMALIZER], path)
    return scored_vocabulary(tokens, scores, types, str(path))


def _check_options(trainer: dict[int, Any], normalizer: dict[int, Any], path: Path) -> None:
    for name, found, wanted in (
        ("trainer_spec.model_type", trainer.get(MODEL_TYPE, UNIGRAM), BPE),
        ("normalizer_spec.add_dummy_prefix", normalizer.get(DUMMY_PREFIX, 1), 0),
        ("normalizer_spec.remove_extra_whitespaces", normalizer.get(EXTRA_WHITESPACES, 1), 0),
        ("normalizer_spec.precompiled_charsmap", bytes(normalizer.get(CHARSMAP, b""))[:9], b""),
    ):
        if found != wanted:
            raise ValueError(
                f"{path}: {name} is {found!r}, but Gemma's is {wanted!r}: save tokenizer.json with"
                " transformers.AutoTokenizer"
            )


def _fields(
    data: memoryview, wires: Mapping[int, int], count: Iterator[int]
) -> Iterator[tuple[int, Any]]:
    """Yields number and value of each field of a protobuf message: an int for a varint, a view for
    the other wire types. `count` counts the fields of all messages.

    wires  field → its wire type. Another one raises ValueError; fields that are not listed may have
           any
    """
    position = 0
    while position < len(data):
        if next(count) > MAX_FIELDS:
            raise ValueError(f"it has more than {MAX_FIELDS} fields")
        key, position = _varint(data, position)
        wire, size = key & 7, {FIXED64: 8, FIXED32: 4}.get(key & 7, 0)
        if wires.get(key >> 3, wire) != wire:
            raise ValueError(
                f"field {key >> 3} at byte {position} of its message has wire type {wire}, not"
                f" {wires[key >> 3]}"
            )
        if wire == VARINT:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if wire == BYTES:
            size, position = _varint(data, position)
        elif not size:
            raise ValueError(f"wire type {wire} at byte {position} is unknown")
        if position + size > len(data):
            raise ValueError(f"truncated: a field of {size} bytes runs past the end")
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """Returns an integer of at most 10 bytes, and the position after it."""
    value = 0
    for i in range(10):
        if position + i >= len(data):
            raise ValueError("truncated: an integer runs past the end")
        byte = data[position + i]
        value |= (byte & 127) << (7 * i)
        if byte < 128:
            return value, position + i + 1
    raise ValueError(f"an integer at byte {position} is longer than 10 bytes")
