"""Checks that streamed pieces are whole characters, and that together they equal decode()."""

import random

import pytest
import torch
from tiny_tokenizer import tiny_backend
from transformers import TextStreamer as TransformersStreamer

from gemma_fast.text.streaming import TextIteratorStreamer, TextStreamer
from gemma_fast.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return Tokenizer(tiny_backend(), "tiny")


def stream(tokenizer: Tokenizer, ids: list[int], prompt: str = "the", **options) -> list[str]:
    pieces: list[str] = []
    options = {"skip_prompt": True, "skip_special_tokens": True, **options}
    streamer = TextStreamer(tokenizer, write=pieces.append, **options)
    streamer.put(torch.tensor([tokenizer.encode(prompt)]))
    for token_id in ids:
        streamer.put(torch.tensor([token_id]))
    streamer.end()
    return pieces


def test_pieces_are_whole_characters(tiny):
    ids = tiny.encode("hé 😀漢", add_special_tokens=False)
    assert len(tiny.encode("😀", add_special_tokens=False)) == 4, "one token for each byte"
    assert stream(tiny, ids) == ["h", "é", " ", "😀", "漢"]


def test_joined_pieces_equal_decode(tiny):
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice(["the ", "😀", "e\u0301", "\n", "<eos>"]) for _ in range(20))
        ids = tiny.encode(text, add_special_tokens=False)
        for skip in (True, False):
            pieces = stream(tiny, ids, skip_special_tokens=skip)
            assert "".join(pieces) == tiny.decode(ids, skip_special_tokens=skip)
            assert all(pieces)


def test_invalid_bytes_become_replacement_characters(tiny):
    """A model can sample any sequence of byte tokens, even if the bytes are not valid UTF-8."""
    emoji = tiny.encode("😀", add_special_tokens=False)
    a, stray = tiny.token_to_id("a"), tiny.token_to_id("<0xFF>")
    assert stream(tiny, emoji[:2]) == ["��"], "end() must write an incomplete character"
    assert stream(tiny, [*emoji, stray, a]) == ["😀", "�a"]
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.choice([a, stray, rng.randrange(len(tiny)), *emoji]) for _ in range(40)]
        assert "".join(stream(tiny, ids)).count("a") >= ids.count(a)
    endless = TextStreamer(tiny, write=(pieces := []).append)
    endless.put(torch.tensor([stray] * 1000))
    assert pieces, "invalid bytes must not delay the text forever"


def test_prompt_can_be_skipped(tiny):
    assert stream(tiny, [2], skip_prompt=False, prompt="the") == ["the"]
    assert stream(tiny, [], prompt="the") == []
    streamer = TextStreamer(tiny, True, write=(pieces := []).append)
    for _ in range(2):
        streamer.put(torch.tensor([tiny.encode("hello")]))
        streamer.put(torch.tensor([tiny.token_to_id("a")]))
        streamer.end()
    assert pieces == ["a", "a"], "the prompt after end() must be skipped"
    with pytest.raises(ValueError, match="batch of 2"):
        streamer.put(torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"skip_prompt": True},
        {"skip_special_tokens": True, "clean_up_tokenization_spaces": True},
    ],
    ids=str,
)
def test_printed_text_equals_transformers(tiny, capsys, options):
    ids = tiny.encode("hello the 😀\nwin<end_of_turn>")
    printed = []
    for kind in (TextStreamer, TransformersStreamer):
        streamer = kind(tiny, **options)
        for value in (torch.tensor([ids]), *torch.tensor(ids).split(1)):
            streamer.put(value)
        streamer.end()
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert printed[0].endswith("\n")


def test_subclass_receives_the_finalized_text(tiny):
    class Recorder(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            received.append((text, stream_end))

    received: list[tuple[str, bool]] = []
    streamer = Recorder(tiny, skip_prompt=True)
    for value in torch.tensor([2, tiny.token_to_id("a"), tiny.token_to_id("<0xC3>")]).split(1):
        streamer.put(value)
    streamer.end()
    assert received == [("a", False), ("�", True)]


def test_iterator_ends_with_the_text(tiny):
    streamer = TextIteratorStreamer(tiny, skip_prompt=True, timeout=5, skip_special_tokens=True)
    for token_id in tiny.encode("<bos>a b<eos>"):
        streamer.put(torch.tensor([token_id]))
    streamer.end()
    assert list(streamer) == ["a", " ", "b"]
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        TextStreamer(tiny, nonsense=1)
