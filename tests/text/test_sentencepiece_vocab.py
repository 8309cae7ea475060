"""Checks that tokenizer.model gives the same ids as tokenizer.json. The files are written here,
because no protobuf library is needed to read them."""

import random
import struct
import time

import pytest
from tiny_tokenizer import (
    CONTROL,
    TEXTS,
    USER_DEFINED,
    gguf_metadata,
    random_text,
    tiny_backend,
    write_tokenizer,
)

from gemma_fast.checkpoint.gguf_reader import GGUFFile
from gemma_fast.text.tokenizer import Tokenizer

BPE = b"\x18\x02"  # field 3, the model type
PLAIN = b"\x0a\x08identity\x12\x00\x18\x00\x20\x00"  # name, charsmap, no prefix, keep white space


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def piece(text: str, score: float, kind: int) -> bytes:
    out = field(1, text.encode()) + b"\x15" + struct.pack("<f", score)
    return out if kind == 1 else out + b"\x18" + varint(kind)  # 1 is the default


def model_file(metadata: dict, trainer: bytes = BPE, normalizer: bytes = PLAIN) -> bytes:
    names = ("tokens", "scores", "token_type")
    rows = zip(*(metadata[f"tokenizer.ggml.{name}"] for name in names), strict=True)
    # SentencePiece stores ▁ in user-defined pieces, for which GGUF has a space.
    pieces = [piece(text.replace(" ", "▁"), score, kind) for text, score, kind in rows]
    return b"".join(field(1, x) for x in pieces) + field(2, trainer) + field(3, normalizer)


def test_tiny_model_gives_the_ids_of_tokenizer_json(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model_file(gguf_metadata()))
    (tmp_path / "config.json").write_text('{"model_type": "gemma3"}')
    ours = Tokenizer.from_pretrained(tmp_path)
    json_one = Tokenizer(tiny_backend(), "tokenizer.json")
    assert ours.vocab == json_one.vocab
    assert str(ours.added_tokens_decoder) == str(json_one.added_tokens_decoder)
    for text in TEXTS.values():
        assert ours.encode(text) == json_one.encode(text)
    assert ours.source.endswith("tokenizer.model")


@pytest.mark.slow
def test_real_vocabulary_gives_the_ids_of_the_gguf_file(demo_gguf, tmp_path):
    metadata = GGUFFile(demo_gguf).metadata
    (tmp_path / "tokenizer.model").write_bytes(model_file(metadata))
    ours, judge = Tokenizer.from_pretrained(tmp_path), Tokenizer.from_pretrained(demo_gguf)
    assert ours.vocab == judge.vocab
    assert str(ours.added_tokens_decoder) == str(judge.added_tokens_decoder)
    assert ours.encode("The superlative") == [2, 818, 216903]
    rng, pieces = random.Random(0), list(judge.vocab)
    texts = [*TEXTS.values(), *(random_text(rng, pieces) for _ in range(300))]
    assert ours(texts).input_ids == judge(texts).input_ids


def test_settings_of_the_config_apply(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model_file(gguf_metadata()))
    assert Tokenizer.from_pretrained(tmp_path).encode("a")[0] == 2
    config = '{"add_bos_token": false, "add_eos_token": true, "eos_token": "<end_of_turn>"}'
    (tmp_path / "tokenizer_config.json").write_text(config)
    ours = Tokenizer.from_pretrained(tmp_path)
    assert ours.encode("a") == [ours.token_to_id("a"), 106]


def test_tokenizer_json_has_priority(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"broken")
    assert Tokenizer.from_pretrained(tmp_path).encode("a")[0] == 2


GOOD = model_file(gguf_metadata())
BAD = {
    "empty": (b"", "not a readable SentencePiece model: it has no pieces"),
    "truncated": (GOOD[:-3], "not a readable SentencePiece model: truncated"),
    "truncated integer": (b"\xff", "truncated"),
    "long integer": (b"\xff" * 20, "longer than 10 bytes"),
    "long field": (b"\x0a" + varint(1 << 60) + b"a", "truncated: a field of"),
    "unknown wire type": (b"\x0b", "wire type 3"),
    "no piece": (GOOD + field(1, b"\x15" + bytes(4)), "not a readable .*piece 475 has no text"),
    "number as a piece": (field(1, b"\x08\x01"), "not a readable"),
    "not UTF-8": (field(1, field(1, b"\xff")), "not a readable"),
    "charsmap as a number": (
        model_file(gguf_metadata(), BPE, PLAIN + b"\x10" + varint(1 << 62)),
        "not a readable .*field 2 .*wire type 0, not 2",
    ),
    "model type as text": (model_file(gguf_metadata(), field(3, b"a")), "wire type 2, not 0"),
    "prefix as text": (model_file(gguf_metadata(), BPE, field(3, b"a")), "wire type 2, not 0"),
    "trainer as a number": (GOOD + b"\x10\x01", "field 2 .*wire type 0, not 2"),
    "piece in 8 bytes": (GOOD + field(1, b"\x09" + bytes(8)), "field 1 .*wire type 1, not 2"),
    "score as a number": (field(1, field(1, b"a") + b"\x10\x01"), "not a readable"),
    "type as text": (field(1, field(1, b"a") + field(3, b"a")) + field(2, BPE) + field(3, PLAIN),
                     "not a readable"),
    "twice": (GOOD + field(1, piece("a", 0.0, 1)), "contains a token twice"),
    "not finite": (GOOD + field(1, piece("zzz", float("nan"), 1)), "not finite"),
    "unigram": (model_file(gguf_metadata(), b"\x18\x01"), "model_type is 1, but Gemma's is 2"),
    "no model type": (model_file(gguf_metadata(), b""), "model_type is 1"),
    "prefix": (model_file(gguf_metadata(), BPE, b"\x20\x00"), "add_dummy_prefix is 1"),
    "white space": (model_file(gguf_metadata(), BPE, b"\x18\x00"), "remove_extra_whitespaces is 1"),
    "charsmap": (model_file(gguf_metadata(), BPE, PLAIN + field(2, b"x")), "precompiled_charsmap"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_bad_file_is_refused(tmp_path, content, message):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=rf"tokenizer\.model.*{message}"):
        Tokenizer.from_pretrained(tmp_path)


def test_huge_file_is_refused_without_reading_it(tmp_path):
    with (tmp_path / "tokenizer.model").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"is 1099511627776 bytes long; the limit is"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"\x0a\x02\x0a\x00" * (2 << 20), field(1, b"\x48\x01" * ((4 << 20) - 8))],
    ids=["empty pieces", "many fields"],
)
def test_many_fields_are_refused_soon(tmp_path, content):
    start = time.monotonic()
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"not a readable .*more than 1048576 fields"):
        Tokenizer.from_pretrained(tmp_path)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("kind", [CONTROL, USER_DEFINED])
def test_many_control_tokens_are_refused_soon(tmp_path, kind):
    start = time.monotonic()
    pieces = [field(1, field(1, f"u{i}".encode()) + b"\x18" + varint(kind)) for i in range(340_000)]
    (tmp_path / "tokenizer.model").write_bytes(GOOD + b"".join(pieces))
    with pytest.raises(ValueError, match=r"tokenizer\.model: the token types make 340111 .*32768"):
        Tokenizer.from_pretrained(tmp_path)
    assert time.monotonic() - start < 10


def test_long_pieces_are_refused_or_read_soon(tmp_path):
    start = time.monotonic()
    pieces = [field(1, piece(f"{i:08}" + "x" * 248, 0.0, 1)) for i in range(16_000)]
    (tmp_path / "tokenizer.model").write_bytes(GOOD + b"".join(pieces))
    assert len(Tokenizer.from_pretrained(tmp_path)) == 475 + 16_000
    assert time.monotonic() - start < 10
    (tmp_path / "tokenizer.model").write_bytes(GOOD + b"".join([*pieces, *pieces[:500]]))
    with pytest.raises(ValueError, match="characters; the limit is 4194304"):
        Tokenizer.from_pretrained(tmp_path)
