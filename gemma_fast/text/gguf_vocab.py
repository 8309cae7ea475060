"""Builds a BPE tokenizer from the pieces of a SentencePiece model, as stored in a GGUF file or in
tokenizer.model. It is equal to the tokenizer that was converted to GGUF.

GGUF files of Gemma 4 store BPE's merges. In the other files, the scores of the pieces define them:
see scored_merges.py.
"""

import math
from collections.abc import Mapping, Sequence

from tokenizers import AddedToken, Regex, pre_tokenizers
from tokenizers import Tokenizer as Backend

from gemma_fast.text.scored_merges import USER_DEFINED, Merges, ScoredMerges, bpe

UNKNOWN, CONTROL = 2, 3
ADDED = (UNKNOWN, CONTROL, USER_DEFINED)
TYPES = range(1, 7)  # 5 and 6 mark unused tokens and bytes
# tokenizer.ggml.model → the lists that define its vocabulary
COLUMNS = {
    "llama": {"tokens": str, "token_type": int, "scores": float},
    "gemma4": {"tokens": str, "token_type": int, "merges": str},
}
MAX_PIECE = 256  # characters; Gemma's longest piece has 31. Finding merges takes quadratic time.
MAX_ADDED = 1 << 15  # tokens that are split off before the BPE merges; Gemma 3 has 6415
MAX_CHARACTERS = 4 << 20  # of all pieces; Gemma 3's have 1.5 million
MAX_MERGES = 1 << 20  # Gemma 4 has 514,906
# Gemma 4 merges within a line and within a run of newlines, never across their border.
NEWLINES = pre_tokenizers.Split(Regex(r"\n+|[^\n]+"), behavior="isolated")


def gguf_vocabulary(
    metadata: Mapping[str, object], source: str
) -> tuple[Backend, ScoredMerges | None]:
    """Returns the tokenizer that a GGUF file's `metadata` describe, without normalizer and decoder,
    and the merges that its model still lacks.

    Raises ValueError, with `source` in the message, for malformed metadata.
    """
    model = metadata.get("tokenizer.ggml.model")
    if not isinstance(model, str) or model not in COLUMNS:
        raise ValueError(
            f"{source}: tokenizer.ggml.model is {model!r:.60}, but Gemma's is one of"
            f" {', '.join(COLUMNS)}"
        )
    columns = []
    for name, kind in COLUMNS[model].items():
        column = metadata.get(f"tokenizer.ggml.{name}")
        if not isinstance(column, list) or set(map(type, column)) != {kind}:
            raise ValueError(
                f"{source}: tokenizer.ggml.{name} must be a non-empty list of {kind.__name__}"
            )
        columns.append(column)
    tokens, types, values = columns
    if model == "llama":
        return scored_vocabulary(tokens, values, types, source)
    vocab = _vocabulary(tokens, types, source)
    backend = _bpe_backend(vocab, _stored_merges(vocab, values, source), types)
    backend.pre_tokenizer = NEWLINES
    return backend, None


def gguf_backend(metadata: Mapping[str, object], source: str) -> Backend:
    """Returns the tokenizer of `gguf_vocabulary` with all merges."""
    backend, merges = gguf_vocabulary(metadata, source)
    if merges is not None:
        backend.model = merges.model()
    return backend


def scored_vocabulary(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], source: str
) -> tuple[Backend, ScoredMerges]:
    """Returns the tokenizer with these pieces, without normalizer and decoder, and its merges,
    which its model still lacks. The id of a piece is its position. Raises ValueError, with `source`
    in the message, for malformed columns."""
    if len(tokens) != len(scores):
        raise ValueError(
            f"{source}: {len(tokens)} tokens, {len(scores)} scores: the numbers must be equal"
        )
    if not all(map(math.isfinite, scores)):
        raise ValueError(f"{source}: the scores of tokens contain a number that is not finite")
    vocab = _vocabulary(tokens, types, source)
    return _bpe_backend(vocab, [], types), ScoredMerges(vocab, scores, types)


def _bpe_backend(vocab: dict[str, int], merges: Merges, types: Sequence[int]) -> Backend:
    backend = Backend(bpe(vocab, merges))
    backend.add_tokens(
        [
            AddedToken(piece, normalized=False, special=type_ != USER_DEFINED)
            for piece, type_ in zip(vocab, types, strict=True)
            if type_ in ADDED
        ]
    )
    return backend


def _vocabulary(tokens: Sequence[str], types: Sequence[int], source: str) -> dict[str, int]:
    """Returns the pieces and their ids, in the order of the ids."""
    _check_columns(tokens, types, source)
    pieces = [*tokens]
    for i, type_ in enumerate(types):
        if type_ == USER_DEFINED:
            pieces[i] = pieces[i].replace(" ", "▁")
    vocab = dict(zip(pieces, range(len(pieces)), strict=True))
    if len(vocab) != len(pieces):
        raise ValueError(f"{source}: the vocabulary contains a token twice")
    return vocab


def _check_columns(tokens: Sequence[str], types: Sequence[int], source: str) -> None:
    if len(tokens) != len(types):
        raise ValueError(
            f"{source}: {len(tokens)} tokens, {len(types)} token types: the numbers must be equal"
        )
    lengths = [*map(len, tokens)]
    if (longest := max(lengths)) > MAX_PIECE:
        raise ValueError(f"{source}: a token has {longest} characters; the limit is {MAX_PIECE}")
    if (total := sum(lengths)) > MAX_CHARACTERS:
        raise ValueError(
            f"{source}: the tokens have {total} characters; the limit is {MAX_CHARACTERS}"
        )
    if unknown := set(types).difference(TYPES):
        raise ValueError(f"{source}: the token_type {min(unknown)} is not one of 1 to 6")
    if (added := sum(map(types.count, ADDED))) > MAX_ADDED:
        raise ValueError(
            f"{source}: the token types make {added} control and user-defined tokens; the limit is"
            f" {MAX_ADDED}"
        )


def _stored_merges(vocab: Mapping[str, int], merges: Sequence[str], source: str) -> Merges:
    """Returns merges, which are stored as "left right", as pairs. As in llama.cpp, the first space
    that is not the first character separates the halves."""
    if len(merges) > MAX_MERGES:
        raise ValueError(
            f"{source}: tokenizer.ggml.merges has {len(merges)} merges; the limit is {MAX_MERGES}"
        )
    pairs: dict[tuple[str, str], None] = {}
    for merge in merges:
        head, _, right = merge[1:].partition(" ")
        left = merge[:1] + head
        if not (left and right and left in vocab and right in vocab and left + right in vocab):
            raise ValueError(
                f"{source}: tokenizer.ggml.merges has {merge!r:.60}: it must be two tokens with a"
                " space between them, which together are a token"
            )
        pairs[left, right] = None
    if len(pairs) != len(merges):
        raise ValueError(f"{source}: tokenizer.ggml.merges contains a merge twice")
    return [*pairs]
