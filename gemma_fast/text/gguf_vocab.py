"""Builds a BPE tokenizer from the pieces of a SentencePiece model, as stored in a GGUF file or in
tokenizer.model. It is equal to the tokenizer that was converted to GGUF.

Neither file stores BPE's merges. The scores define them: SentencePiece merges the two neighbors
whose joint piece has the highest score, so each split of a piece into two pieces is a merge, and
merges are sorted by the piece's score.
"""

import math
from collections.abc import Mapping, Sequence
from operator import itemgetter

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
ADDED = (UNKNOWN, CONTROL, USER_DEFINED)
TYPES = range(1, 7)  # 5 and 6 mark unused tokens and bytes
COLUMNS = {"tokens": str, "scores": float, "token_type": int}
MAX_PIECE = 256  # characters; Gemma's longest piece has 31. Finding merges takes quadratic time.
MAX_ADDED = 1 << 15  # tokens that are split off before the BPE merges; Gemma 3 has 6415
MAX_CHARACTERS = 4 << 20  # of all pieces; Gemma 3's have 1.5 million


def gguf_backend(metadata: Mapping[str, object], source: str) -> Backend:
    """Returns the tokenizer that a GGUF file's `metadata` describe, without normalizer and decoder.

    Raises ValueError, with `source` in the message, for malformed metadata.
    """
    if metadata.get("tokenizer.ggml.model") != "llama":
        model = metadata.get("tokenizer.ggml.model")
        raise ValueError(f"{source}: tokenizer.ggml.model is {model!r}, but Gemma's is 'llama'")
    columns = []
    for name, kind in COLUMNS.items():
        column = metadata.get(f"tokenizer.ggml.{name}")
        if not isinstance(column, list) or set(map(type, column)) != {kind}:
            raise ValueError(
                f"{source}: tokenizer.ggml.{name} must be a non-empty list of {kind.__name__}"
            )
        columns.append(column)
    tokens, scores, types = columns
    return bpe_backend(tokens, scores, types, source)


def bpe_backend(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], source: str
) -> Backend:
    """Returns the tokenizer with these pieces, without normalizer and decoder. The id of a piece is
    its position. Raises ValueError, with `source` in the message, for malformed columns."""
    _check_columns(tokens, scores, types, source)
    pieces = [
        token.replace(" ", "▁") if type_ == USER_DEFINED else token
        for token, type_ in zip(tokens, types, strict=True)
    ]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise ValueError(f"{source}: the vocabulary contains a token twice")

    backend = Backend(
        BPE(
            vocab,
            _merges(vocab, scores, types),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.add_tokens(
        [
            AddedToken(piece, normalized=False, special=type_ != USER_DEFINED)
            for piece, type_ in zip(pieces, types, strict=True)
            if type_ in ADDED
        ]
    )
    return backend


def _check_columns(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], source: str
) -> None:
    if not len(tokens) == len(scores) == len(types):
        raise ValueError(
            f"{source}: {len(tokens)} tokens, {len(scores)} scores and {len(types)} token types:"
            " the numbers must be equal"
        )
    if longest := next((token for token in tokens if len(token) > MAX_PIECE), ""):
        raise ValueError(
            f"{source}: a token has {len(longest)} characters; the limit is {MAX_PIECE}"
        )
    if (total := sum(map(len, tokens))) > MAX_CHARACTERS:
        raise ValueError(
            f"{source}: the tokens have {total} characters; the limit is {MAX_CHARACTERS}"
        )
    if not all(map(math.isfinite, scores)):
        raise ValueError(f"{source}: the scores of tokens contain a number that is not finite")
    if unknown := set(types).difference(TYPES):
        raise ValueError(f"{source}: the token_type {min(unknown)} is not one of 1 to 6")
    if (added := sum(map(ADDED.__contains__, types))) > MAX_ADDED:
        raise ValueError(
            f"{source}: the token types make {added} control and user-defined tokens; the limit is"
            f" {MAX_ADDED}"
        )


def _merges(
    vocab: Mapping[str, int], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """Returns the pairs of pieces that merge to another piece. The order is by score of that piece,
    then by length of the left half, then by length of the right half, all descending."""
    ranked = []
    for piece, score, type_ in zip(vocab, scores, types, strict=True):
        if type_ == USER_DEFINED:
            score = 0.0  # the highest, as SentencePiece splits off these pieces before it merges
        elif type_ != NORMAL:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                ranked.append((score, cut, len(right), left, right))
    ranked.sort(key=itemgetter(0, 1, 2), reverse=True)
    return [(left, right) for _, _, _, left, right in ranked]
