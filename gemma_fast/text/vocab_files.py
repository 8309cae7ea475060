"""Loads the vocabulary of a model's directory: tokenizer.json, or tokenizer.model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, normalizers
from tokenizers.pre_tokenizers import PreTokenizer

from gemma_fast.text.gguf_vocab import MAX_ADDED, NEWLINES
from gemma_fast.text.scored_merges import ScoredMerges
from gemma_fast.text.sentencepiece_vocab import sentencepiece_vocabulary

MAX_BYTES = 128 << 20  # of tokenizer.json; Gemma 3's takes 33 MB
# Normalizer and decoder are the same for every Gemma.
NORMALIZER = normalizers.Replace(" ", "▁")
NEWLINE_PATTERNS = (r"\n+|[^\n]+", r"[^\n]+|\n+", r"[^\n]+|[\n]+", r"\n+")
DECODER = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def load_vocabulary(directory: Path) -> tuple[Path, Backend, ScoredMerges | None]:
    """Returns the file that contains the vocabulary, the tokenizer that it describes, and the
    merges that its model still lacks."""
    file, model = directory / "tokenizer.json", directory / "tokenizer.model"
    if not file.is_file() and model.is_file():
        return model, *sentencepiece_vocabulary(model)
    if not file.is_file():
        raise FileNotFoundError(
            f"{directory} has no {file.name} and no {model.name}: pass the directory of a model"
        )
    if (size := file.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{file} is {size} bytes long; the limit is {MAX_BYTES}")
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # tokenizers raises Exception, not a subclass
        raise ValueError(f"{file} is not a readable tokenizer: {error}") from error
    if (count := len(backend.get_added_tokens_decoder())) > MAX_ADDED:
        raise ValueError(f"{file}: added_tokens has {count} tokens; the limit is {MAX_ADDED}")
    return file, backend, None


def check_pipeline(backend: Backend, file: Path) -> None:
    """Raises ValueError if the file prepares or decodes text in another way than Gemma's."""
    for name, found, wanted in (
        ("normalizer", backend.normalizer, NORMALIZER),
        ("decoder", backend.decoder, DECODER),
    ):
        state = found and json.loads(found.__getstate__())
        if state != json.loads(wanted.__getstate__()):
            raise ValueError(
                f"{file}: {name} is {state!r:.200}, but Gemma's is {wanted!r:.200}: use"
                " transformers.AutoTokenizer, whose tensors this model takes"
            )


def newline_split(backend: Backend) -> PreTokenizer | None:
    """Returns Gemma 4's split at newlines if `backend` has an equal pre-tokenizer, else None:
    Gemma's other pre-tokenizer splits at spaces, which the normalizer has replaced."""
    state = backend.pre_tokenizer and json.loads(backend.pre_tokenizer.__getstate__())
    wanted = json.loads(NEWLINES.__getstate__())
    for pattern in NEWLINE_PATTERNS:
        if state == wanted | {"pattern": {"Regex": pattern}}:
            return NEWLINES
    return None


def warn_of_missing_bos(settings: dict[str, Any], file: Path) -> None:
    if settings.get("add_bos_token") is None:
        settings["add_bos_token"] = False
        warnings.warn(
            f"{file} has no post_processor, so no <bos> is added to a text, as in transformers:"
            " pass add_bos_token=True for Gemma's usual ids",
            stacklevel=3,
        )
