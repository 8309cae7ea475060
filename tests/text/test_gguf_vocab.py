"""Checks that the tokenizer of a GGUF file splits text as SentencePiece does. Uses the vocabulary
of a real Gemma, and a tiny vocabulary."""

import random
from collections.abc import Callable

import pytest
from tiny_tokenizer import (
    CONTROL,
    NORMAL,
    TEXTS,
    USER_DEFINED,
    gguf_metadata,
    random_text,
    tiny_backend,
)

from gemma_fast.checkpoint.gguf_reader import GGUFFile
from gemma_fast.text.gguf_vocab import gguf_backend
from gemma_fast.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def demo(demo_gguf) -> Tokenizer:
    return Tokenizer.from_pretrained(demo_gguf)


def test_demo_tokenizer_gives_known_ids(demo):
    assert demo.encode("I want to move") == [2, 236777, 1461, 531, 2827]
    assert demo.encode("The superlative") == [2, 818, 216903]
    assert demo.stop_token_ids == [1, 106]
    assert len(demo) == demo.vocab_size == 262144


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_decode_inverts_encode(demo, text):
    assert demo.decode(demo.encode(text)) == "<bos>" + text


def sentencepiece(metadata: dict) -> Callable[[str], list[str]]:
    """Returns a function that splits text by SentencePiece's algorithm: it splits at user-defined
    symbols, then merges the pair with the best score, until no pair can be merged.

    Source: Kudo and Richardson, 2018. C++ code: PrefixMatcher in normalizer.cc, bpe_model.cc.
    """
    columns = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    rows = list(zip(*columns, strict=True))
    scores = {token: score for token, score, kind in rows if kind == NORMAL}
    users = {token.replace(" ", "▁") for token, _, kind in rows if kind == USER_DEFINED}
    longest = max(map(len, users))

    def cut(text: str) -> list[str]:
        text, parts, start = text.replace(" ", "▁"), [], 0
        while start < len(text):
            stops = range(start + longest, start, -1)
            stop = next((stop for stop in stops if text[start:stop] in users), start + 1)
            parts.append(text[start:stop])
            start = stop
        frozen = [part in users for part in parts]
        while pairs := [
            (scores[parts[i] + parts[i + 1]], -i)
            for i in range(len(parts) - 1)
            if parts[i] + parts[i + 1] in scores and not (frozen[i] or frozen[i + 1])
        ]:
            i = -max(pairs)[1]
            parts[i : i + 2], frozen[i : i + 2] = [parts[i] + parts[i + 1]], [False]
        known = scores.keys() | users
        return [
            piece
            for part in parts
            for piece in ([part] if part in known else [f"<0x{b:02X}>" for b in part.encode()])
        ]

    return cut


def test_gguf_tokenizer_splits_text_as_sentencepiece_does(demo, demo_gguf):
    metadata = GGUFFile(demo_gguf).metadata
    judge = sentencepiece(metadata)
    columns = (metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"])
    pieces = [t for t, kind in zip(*columns, strict=True) if kind in (NORMAL, USER_DEFINED)]
    rng = random.Random(0)
    for _ in range(100):
        text = random_text(rng, pieces)
        assert demo.backend.encode(text).tokens == judge(text), repr(text)


def test_tokenizer_from_gguf_equals_tokenizer_json():
    """Merges written by hand and merges derived from scores must split all texts the same way."""
    tiny = Tokenizer(tiny_backend(), "tokenizer.json")
    rebuilt = Tokenizer(gguf_backend(gguf_metadata(), "tiny.gguf"), "tiny.gguf")
    assert rebuilt.backend.get_vocab() == tiny.backend.get_vocab()
    rng = random.Random(0)
    for _ in range(300):
        text = random_text(rng, ["▁the", "hello", "the", "<b>", "<bos>", "▁win", "<end_of_turn>"])
        assert rebuilt.encode(text) == tiny.encode(text), repr(text)
        assert rebuilt.decode(tiny.encode(text), True) == tiny.decode(tiny.encode(text), True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "gpt2"}, "'gpt2'"),
        ({"tokens": None}, "tokens must be a non-empty list of str"),
        ({"tokens": ["<pad>", 1]}, "tokens must be a non-empty list of str"),
        ({"scores": [0.0]}, "475 tokens, 1 scores"),
        ({"scores": [1] * 475}, "scores must be a non-empty list of float"),
        ({"scores": [0.0] * 474 + [float("nan")]}, "not finite"),
        ({"token_type": [1.5] * 475}, "token_type must be a non-empty list of int"),
        ({"token_type": [7] * 475}, "token_type 7 is not"),
        ({"tokens": ["x"] * 475}, "twice"),
        (
            {
                "tokens": [f"x{i}" for i in range(1 << 19)],
                "scores": [0.0] * (1 << 19),
                "token_type": [CONTROL] * (1 << 19),
            },
            "token types make 524288 control and user-defined tokens; the limit is 32768",
        ),
        ({"tokens": ["x" * 257] * 475}, "257 characters"),
        ({"tokens": [f"x{i}" for i in range(475)]}, "lacks .*<pad>"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_malformed_metadata_is_refused(change, message):
    metadata = gguf_metadata() | {f"tokenizer.ggml.{k}": v for k, v in change.items()}
    with pytest.raises(ValueError, match=rf"bad\.gguf.*{message}"):
        Tokenizer(gguf_backend(metadata, "bad.gguf"), "bad.gguf")


def test_control_tokens_are_detected_by_name():
    """Old converters mark control tokens as user-defined or normal, so merges could yield them."""
    metadata = gguf_metadata()
    types = metadata["tokenizer.ggml.token_type"]
    types[2], types[106] = NORMAL, USER_DEFINED
    tokenizer = Tokenizer(gguf_backend(metadata, "old.gguf"), "old.gguf")
    assert tokenizer.encode("<bos>a<end_of_turn>") == [2, tokenizer.token_to_id("a"), 106]
    assert tokenizer.decode([2, 106], skip_special_tokens=True) == ""


@pytest.mark.filterwarnings("ignore:.*there is no chat template")
def test_chat_text_is_not_merged_to_a_control_token():
    metadata = gguf_metadata()
    the = metadata["tokenizer.ggml.tokens"].index("the")
    metadata["tokenizer.ggml.token_type"][the] = CONTROL
    tokenizer = Tokenizer(gguf_backend(metadata, "tiny.gguf"), "tiny.gguf")
    assert tokenizer.encode("the") == [2, the]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "the"}]).input_ids
    assert the not in ids
