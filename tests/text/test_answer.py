"""Tests that an answer is separated, token by token, into text, thoughts and tool calls."""

import random

import pytest
from tiny_gemma4 import write_tokenizer
from tiny_tokenizer import tiny_backend

from gemma_fast.text.answer import AnswerText, Piece, StopStrings
from gemma_fast.text.streaming import split_thoughts
from gemma_fast.text.tokenizer import Tokenizer
from gemma_fast.text.tool_calls import ToolCall

CALL = '<|tool_call>call:f{a:<|"|>the {b}<|"|>}<tool_call|>'
READ = ToolCall("f", {"a": "the {b}"})


@pytest.fixture(scope="module")
def gemma4(tmp_path_factory) -> Tokenizer:
    return Tokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def gemma3() -> Tokenizer:
    return Tokenizer(tiny_backend(), "tiny")


def pieces(tokenizer: Tokenizer, text: str, prompt: str = "", **options) -> list[list[Piece]]:
    """Returns the pieces after each token, and at the end."""
    ids, before = (tokenizer.encode(x, add_special_tokens=False) for x in (text, prompt))
    answer = AnswerText(tokenizer, before, **options)
    return [*(answer.add([token]) for token in ids), answer.end()]


def joined(found: list[list[Piece]], kind: str = "text") -> str:
    return "".join(piece.text for step in found for piece in step if piece.kind == kind)


def calls(found: list[list[Piece]]) -> list[ToolCall]:
    return [piece.call for step in found for piece in step if piece.call]


def test_text_is_passed_on_with_each_token(gemma3):
    found = pieces(gemma3, "hello the 😀<end_of_turn>")
    assert [joined([step]) for step in found] == ["hello", " the", " ", "", "", "", "😀", "", ""]


def test_thoughts_are_those_of_split_thoughts(gemma4):
    text = "<|channel>thought\nhe é\n<channel|>hello 😀<turn|>"
    found = pieces(gemma4, text, "<|turn>model\n", chat=True)
    whole = split_thoughts(gemma4, gemma4.encode(text, add_special_tokens=False))
    assert (joined(found, "thought"), joined(found)) == whole == ("he é\n", "hello 😀")
    assert joined(pieces(gemma4, "he<channel|>a", "<|channel>thought\n", chat=True)) == "a"
    assert joined(pieces(gemma4, text)) == "thought\nhe é\nhello 😀", "not a chat"


def test_calls_are_read_only_if_asked_for(gemma4):
    text = f"<|channel>thought\nhe<channel|>a{CALL}{CALL}<|tool_response>"
    found = pieces(gemma4, text, chat=True, calls=True)
    assert (joined(found, "thought"), joined(found), calls(found)) == ("he", "a", [READ] * 2)
    at_end_of_call = [i for i, step in enumerate(found) if step and step[-1].call]
    assert len(at_end_of_call) == 2, "a call is passed on as soon as it is complete"
    found = pieces(gemma4, text, chat=True)
    assert (joined(found), calls(found)) == ("a" + "call:f{a:the {b}}" * 2, [])


@pytest.mark.parametrize("text", ["<|tool_call>hello<tool_call|>", "<|tool_call>call:f{a:1"])
def test_broken_call_is_text(gemma4, text):
    found = pieces(gemma4, f"a{text}", chat=True, calls=True)
    assert (joined(found), calls(found)) == ("a" + text[12:].removesuffix("<tool_call|>"), [])


def test_vocabulary_without_calls_has_none(gemma3):
    found = pieces(gemma3, CALL, chat=True, calls=True)
    assert (joined(found), calls(found)) == (CALL, [])


def test_text_ends_before_a_stop_string(gemma3):
    answer = AnswerText(gemma3, [], stop_strings=["o the", "zz"])
    ids = gemma3.encode("a hello the in", add_special_tokens=False)
    found = [[piece.text for piece in answer.add([token])] for token in ids]
    assert "".join(x for step in found for x in step) == "a hell"
    assert answer.stopped
    assert answer.end() == []


def test_text_that_may_begin_a_stop_string_waits(gemma3):
    answer = AnswerText(gemma3, [], stop_strings=["o thX"])
    ids = gemma3.encode("hello the", add_special_tokens=False)
    assert [joined([answer.add([token])]) for token in ids] == ["hell", "o the"]
    answer = AnswerText(gemma3, [], stop_strings=["o thX"])
    answer.add(gemma3.encode("hello", add_special_tokens=False))
    assert joined([answer.end()]) == "o"


def test_stop_string_ends_thoughts_and_what_follows(gemma4):
    text = f"<|channel>thought\nhe is<channel|>a{CALL}"
    found = pieces(gemma4, text, chat=True, calls=True, stop_strings=["is"])
    assert (joined(found, "thought"), joined(found), calls(found)) == ("he ", "", [])


def test_stop_strings_cut_any_text_at_the_first_one():
    """Compares with a search in the whole text, for random texts, pieces and stop strings."""
    rng = random.Random(0)
    stopped = 0
    for _ in range(2000):
        text = "".join(rng.choice("abc") for _ in range(rng.randint(0, 12)))
        stops = ["".join(rng.choice("abc") for _ in range(rng.randint(1, 4))) for _ in range(2)]
        stopper, out, start = StopStrings(stops), "", 0
        while start < len(text) and not stopper.stopped:
            end = start + rng.randint(1, 3)
            out, start = out + stopper.add(text[start:end]), end
        seen = text[:start]
        ends = [seen.find(stop) for stop in stops if stop in seen]
        assert stopper.stopped == bool(ends)
        stopped += stopper.stopped
        assert out + ("" if ends else stopper.end()) == seen[: min(ends, default=len(seen))]
    assert 500 < stopped < 1900
