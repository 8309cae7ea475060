"""Compares token ids, and the tokens that end a text, with those of transformers or llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from gemma_fast.benchmarks.verify import margins as of
from gemma_fast.benchmarks.verify.margins import MODEL, Finding, finding
from gemma_fast.benchmarks.verify.truth import Truth
from gemma_fast.checkpoint.base import Checkpoint
from gemma_fast.engine.options import GenerationConfig
from gemma_fast.engine.request import end_token_ids
from gemma_fast.text.tokenizer import Tokenizer

# Charles Darwin, On the Origin of Species (1859), introduction: longer than a window of 512 tokens.
# Franz Kafka, Die Verwandlung (1915), beginning. A program in Python.
TEXTS = ("darwin", "kafka", "python")
MIXED = "  two  spaces\n\n\n\ttab 漢字 😀 é e\u0301 <b>\x07 <start_of_turn>user\nhe'll </b>1,000.5"


def read_text(name: str = "darwin") -> str:
    path = Path(__file__).with_name("texts") / f"{name}.txt"
    return path.read_text(encoding="utf-8").strip()


def check_ids(checkpoint: Checkpoint, truth: Truth, model: Any) -> Iterator[Finding]:
    """Yields a finding: whether our ids of two texts are those of the truth's own tokenizer, and
    whether `generate` ends a text at the same tokens. model: the truth's model"""
    if truth.ids is None:
        return
    ours = Tokenizer.from_pretrained(checkpoint.path)
    try:
        expected = [truth.ids(text) for text in (read_text(), MIXED)]
    except Exception as error:  # any error of transformers: report it and continue
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        yield Finding(MODEL, f"ids of the text: not compared, because of {reason}", "", ())
        return
    found = [list(ours(text)["input_ids"]) for text in (read_text(), MIXED)]
    pairs = zip(found, expected, strict=True)
    differ = sum(x != y for a, b in pairs for x, y in zip_longest(a, b))
    given = model.generation_config.eos_token_id
    ends = truth.ends or ({given} if isinstance(given, int) else set(given or ()))
    options = checkpoint.generation_config or GenerationConfig.of_model(checkpoint.config)
    ours_end = end_token_ids(options, checkpoint.config.vocab_size)
    figures: dict[str, tuple[float, float | None]] = {
        of.IDS_DIFFER: (differ, None), of.ENDS_DIFFER: (len(set(ours_end) ^ ends), None),
    }  # fmt: skip
    yield finding(MODEL, "differing ids of the text / end tokens", torch.int64, figures)
