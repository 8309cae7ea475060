"""Builds a tokenizer with a few merges, as metadata of a GGUF file and as tokenizer.json.

Ids up to <end_of_turn> are the ids of the real Gemma. The merges of tokenizer.json are listed here,
so that tests can compare them with the merges that are derived from a GGUF file's scores.
"""

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models
from tokenizers.processors import TemplateProcessing

NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
END_OF_TURN = {"gemma": 107, "gemma2": 107, "gemma3": 106}
ADDED = ("\n", "\n\n", "<b>", "<start_of_image>")
MERGES = [
    ("\n", "\n"), ("h", "e"), ("t", "he"), ("▁", "the"), ("l", "l"), ("he", "ll"), ("hell", "o"),
    ("▁", "w"), ("i", "n"), ("▁", "t"), ("e", "r"), ("é", "é"),
]  # fmt: skip
TEXTS = {
    "empty": "",
    "words": "hello the world in the thinner",
    "spaces": "  a " + " " * 70 + "b  ",
    "lines": "a\n\n\nb\n \r\n\tc\t\t",
    "accents": "é éé e\u0301 ñ",
    "cjk": "漢字 かな 한국어",
    "emoji": "😀👩\u200d👩\u200d👧🏽",
    "control": "\x00\x01\x1b[0m\x7f",
    "rtl": "שלום \u202eabc",
    "tags": "<b><h1> <start_of_image> <0x41> <|im_end|>",
    "special": "a<end_of_turn>b<unused3>",
}


def gguf_metadata(family: str = "gemma3") -> dict[str, object]:
    unused = [f"<unused{i}>" for i in range(END_OF_TURN[family] - 5)]
    control = ["<pad>", "<eos>", "<bos>", "<unk>", *unused, "<start_of_turn>", "<end_of_turn>"]
    # Merged tokens are in the order of their merges, with decreasing scores, as in a real file.
    made = [a + b for a, b in MERGES if a + b not in ADDED]
    letters = ["▁", "é", "漢", *map(chr, range(33, 127))]
    columns = [
        *((token, CONTROL, -1000.0) for token in control),
        *((f"<0x{i:02X}>", BYTE, -1000.0) for i in range(256)),
        *((token, USER_DEFINED, -1000.0) for token in ADDED),
        *((token, NORMAL, -float(i)) for i, token in enumerate(made + letters)),
    ]
    tokens, types, scores = (list(column) for column in zip(*columns, strict=True))
    return {
        "general.architecture": family,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": False,
    }


def tiny_backend(family: str = "gemma3") -> Tokenizer:
    """Returns the tokenizer to save as tokenizer.json. It has no normalizer and no decoder."""
    metadata = gguf_metadata(family)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(
        models.BPE(vocab, MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    for token, type_ in zip(tokens, types, strict=True):
        if type_ in (CONTROL, USER_DEFINED):
            backend.add_tokens([AddedToken(token, normalized=False, special=type_ == CONTROL)])
    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return backend


def write_tokenizer(directory: Path, family: str = "gemma3") -> Path:
    tiny_backend(family).save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"model_type": family}))
    return directory


def random_text(rng: random.Random, pieces: list[str]) -> str:
    letters = [*map(chr, range(32, 127)), "é", "ñ", "漢", "字", "😀", "\u0301", "\t", "\n"]
    return "".join(
        rng.choice(
            [
                rng.choice(pieces).replace("▁", " "),
                rng.choice(letters) * rng.randint(1, 3),
                rng.choice(" \n") * rng.randint(1, 80),
            ]
        )
        for _ in range(rng.randint(1, 12))
    )
