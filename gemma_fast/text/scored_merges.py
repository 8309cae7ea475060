"""Finds the merges of a BPE vocabulary whose pieces have scores, when a text needs them.

SentencePiece merges the two neighbors whose joint piece has the highest score. So each split of a
piece into two pieces is a merge, and merges are sorted by the piece's score. Finding all merges of
Gemma's vocabulary takes a second, and a short text needs only those to pieces that it contains.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

NORMAL, USER_DEFINED = 1, 4
MAX_PARTS = 1 << 21  # parts of texts that are looked up before all merges are found
UNKNOWN_PIECE = "<unk>"
Merges = list[tuple[str, str]]


def bpe(vocab: dict[str, int], merges: Merges) -> BPE:
    """Returns Gemma's BPE with this vocabulary and these merges."""
    return BPE(vocab, merges, unk_token=UNKNOWN_PIECE, fuse_unk=True, byte_fallback=True)


class ScoredMerges:
    """The merges of a vocabulary.

    vocab   piece → id, in the order of the ids
    scores  score of each piece, by id; a user-defined piece has the highest of all instead
    types   type of each piece, by id; only normal and user-defined pieces have merges
    file    the vocabulary's file, which is not parsed again for the weights as long as it is in use
    """

    file: Any = None

    def __init__(
        self, vocab: dict[str, int], scores: Sequence[float], types: Sequence[int]
    ) -> None:
        self.vocab, self.scores, self.types = vocab, scores, types
        self._longest = max(map(len, vocab))
        self._parts_left = MAX_PARTS

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"file": None}

    def model(self) -> BPE:
        """Returns the model with all merges."""
        return bpe(self.vocab, self._merges_to(self.vocab))

    def splitter(self, texts: Iterable[str], backend: Backend) -> Backend | None:
        """Returns a tokenizer that splits `texts` as `backend` does with all merges.

        It has only the pieces that the texts contain, because BPE's steps give no others. Returns
        None if a text has a character that is no piece, for which BPE takes the pieces of its
        bytes, or if these texts and those of earlier calls are so long that finding all merges
        takes less time.
        """
        normalized = [backend.normalizer.normalize_str(text) for text in texts]
        self._parts_left -= sum(map(len, normalized)) * self._longest
        if self._parts_left < 0 or not self.vocab.keys() >= set().union(*normalized):
            return None
        parts = {
            text[start : start + length]
            for text in normalized
            for start in range(len(text))
            for length in range(1, self._longest + 1)
        }
        found = sorted((self.vocab[part], part) for part in parts if part in self.vocab)
        pieces = {piece: i for i, piece in found}
        joined = " ".join(normalized)
        added = {
            token.content: (i, token)
            for i, token in backend.get_added_tokens_decoder().items()
            if token.content.replace(" ", "▁") in joined
        }
        ids = {name: i for name, (i, _) in added.items()}  # not those that add_tokens would choose
        splitter = Backend(bpe(pieces | ids, self._merges_to(pieces)))
        splitter.add_tokens([token for _, token in added.values()])
        splitter.normalizer, splitter.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
        return splitter

    def _merges_to(self, pieces: Iterable[str]) -> Merges:
        """Returns the pairs of pieces that merge to one of `pieces`, which are in the order of
        their ids. The order is by score of that piece, then by length of the left half, then by
        length of the right half, all descending."""
        vocab, ranked = self.vocab, []
        for piece in pieces:
            token_id = vocab[piece]
            score, type_ = self.scores[token_id], self.types[token_id]
            if type_ == USER_DEFINED:
                score = 0.0  # SentencePiece splits off these pieces before it merges
            elif type_ != NORMAL:
                continue
            for cut in range(1, len(piece)):
                if (left := piece[:cut]) in vocab and (right := piece[cut:]) in vocab:
                    ranked.append((score, cut, len(right), left, right))
        ranked.sort(key=itemgetter(0, 1, 2), reverse=True)
        return [(left, right) for _, _, _, left, right in ranked]
