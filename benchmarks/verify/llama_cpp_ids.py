"""Computes the token ids of a text, and those that end it, from GGUF metadata by llama.cpp's rules.

Source: tokenizer_st_partition, llm_tokenizer_spm_session (SentencePiece: Gemma 1 to 3) and
llm_tokenizer_bpe_session (BPE: Gemma 4) in llama.cpp's src/llama-vocab.cpp. This file shares no
code with gemma_fast.text.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Mapping
from typing import Any

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # values of tokenizer.ggml.token_type


# Called with two neighbors: the joint piece with the lowest value is merged first; None: not merged
Order = Callable[[str, str], float | None]


def llama_cpp_ids(metadata: Mapping[str, Any], text: str) -> list[int]:
    """Returns the ids of a text. Special tokens in it are recognized. Raises NotImplementedError if
    tokenizer.ggml.model is not "llama", which stands for SentencePiece, or "gemma4"."""
    if (model := metadata["tokenizer.ggml.model"]) not in ("llama", "gemma4"):
        raise NotImplementedError(f"tokenizer.ggml.model {model!r}")
    tokens, types = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    vocab = {token: i for i, token in enumerate(tokens)}
    special = [i for i, kind in enumerate(types) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    fragments: list[str | int] = [text]
    for i in sorted(special, key=lambda i: -len(tokens[i])):
        if tokens[i] and tokens[i] in text:
            fragments = [x for part in fragments for x in split(part, tokens[i], i)]
    ids = [metadata["tokenizer.ggml.bos_token_id"]]
    bpe = model == "gemma4"  # llama.cpp puts <bos> before its texts, whatever the key says
    ids = ids if bpe or metadata.get("tokenizer.ggml.add_bos_token", True) else []
    order = (by_rank if bpe else by_score)(metadata, vocab)
    prefix = not bpe and metadata.get("tokenizer.ggml.add_space_prefix", True)
    special_before = True
    for part in fragments:
        if isinstance(part, int):
            ids.append(part)
        else:
            part = (" " + part if prefix and special_before else part).replace(" ", "▁")
            for piece in re.findall(r"[^\n]+|\n+", part) if bpe else [part]:
                whole = bpe and "\n" in piece and piece in vocab
                ids += [vocab[piece]] if whole else merged(piece, vocab, order)
        special_before = isinstance(part, int)
    return ids


def by_score(metadata: Mapping[str, Any], vocab: Mapping[str, int]) -> Order:
    """Returns SentencePiece's order of merges: the joint piece with the highest score is first."""
    scores = metadata["tokenizer.ggml.scores"]
    return lambda a, b: -scores[vocab[a + b]] if a + b in vocab else None


def by_rank(metadata: Mapping[str, Any], vocab: Mapping[str, int]) -> Order:
    """Returns BPE's order of merges, which is stored. A merge is two pieces with a space between;
    a piece can begin with a space."""
    ranks = {}
    for rank, merge in enumerate(metadata["tokenizer.ggml.merges"]):
        space = merge.index(" ", 1)
        ranks[merge[:space], merge[space + 1 :]] = rank
    return lambda a, b: ranks.get((a, b))


def llama_cpp_ends(metadata: Mapping[str, Any]) -> set[int]:
    """Returns the ids that end a text. llama.cpp also stops at the names of other models' end
    tokens, such as </s>, which is an HTML tag in Gemma's vocabulary."""
    names = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
    keys = (f"tokenizer.ggml.{name}_token_id" for name in names)
    ends = {metadata[key] for key in keys if key in metadata}
    texts = (
        "<eos> <end_of_turn> <|im_end|> <|eot_id|> <|end|> <|endoftext|> <|eom_id|> <EOT> _<EOT>"
    )
    texts += " [EOT] [EOS] <|end_of_text|> <end_of_utterance> <turn|> <|tool_response> <|return|>"
    texts += " <|call|> <|flush|> <|calls|> [e~["
    tokens = metadata["tokenizer.ggml.tokens"]
    return {i for i in ends if 0 <= i < len(tokens)} | {
        i for i, token in enumerate(tokens) if token in texts.split()
    }


def split(part: str | int, token: str, i: int) -> list[str | int]:
    """Returns the fragment with every occurrence of the token replaced by its id."""
    if isinstance(part, int):
        return [part]
    pieces: list[str | int] = [part.split(token)[0]]
    for piece in part.split(token)[1:]:
        pieces += [i, piece]
    return [x for x in pieces if x != ""]


def merged(text: str, vocab: Mapping[str, int], order: Order) -> list[int]:
    """Returns the ids of a text without special tokens. Merges neighbors in this order, the
    leftmost first. Characters that are in no token become bytes."""
    pieces: list[str] = list(text)
    after, before = list(range(1, len(pieces) + 1)), list(range(-1, len(pieces) - 1))
    heap: list[tuple[float, int, int, str]] = []

    def push(left: int, right: int) -> None:
        if left >= 0 and right < len(pieces):
            rank = order(pieces[left], pieces[right])
            if rank is not None:
                heapq.heappush(heap, (rank, left, right, pieces[left] + pieces[right]))

    for i in range(len(pieces) - 1):
        push(i, i + 1)
    while heap:
        _, left, right, joint = heapq.heappop(heap)
        if not (pieces[left] and pieces[right] and pieces[left] + pieces[right] == joint):
            continue  # one of the two was merged before
        pieces[left], pieces[right], after[left] = joint, "", after[right]
        if after[left] < len(pieces):
            before[after[left]] = left
        push(before[left], left)
        push(left, after[left])
    ids = []
    for piece in filter(None, pieces):
        whole = [vocab[piece]] if piece in vocab else None
        ids += whole or [vocab[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return ids
