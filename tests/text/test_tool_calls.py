"""Tests that the tool calls of a Gemma 4 are read, in the format that its template renders."""

import pytest
from tiny_gemma4 import TEMPLATE, write_tokenizer

from gemma_fast.text.tokenizer import Tokenizer
from gemma_fast.text.tool_calls import CALL, END_CALL, MAX_DEPTH, ToolCall, read_tool_call

Q = '<|"|>'
VALUES = {
    "empty": {},
    "text": {"a": "x", "b": ""},
    "marks in a text": {"a": "{x:[1,2]},<b> y:\n'z'", "b": " é "},
    "numbers": {"a": 1, "b": -2.5, "c": 1e20, "d": 0},
    "words": {"a": True, "b": False},
    "nested": {"a": {"b": {"c": [1, [True, "x"], {}]}, "d": []}, "e": [{"f": 1}, {"f": 2}]},
    "keys": {"two words": 1, "a-b.c": 2},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("tiny")))


@pytest.mark.parametrize("arguments", VALUES.values(), ids=VALUES)
def test_call_that_the_template_renders_is_read(tokenizer, arguments):
    call = {"function": {"name": "f_1.x-y", "arguments": arguments}}
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
    text = tokenizer.apply_chat_template(chat, chat_template=TEMPLATE, tokenize=False)
    inside = text.partition(CALL)[2].partition(END_CALL)[0]
    assert read_tool_call(inside) == ToolCall("f_1.x-y", arguments)


def test_quoted_keys_null_and_spaces_are_read():
    text = f" call:f{{ {Q}a:b{Q}: null , c : [ 1 , {Q}x{Q} ] }} "
    assert read_tool_call(text) == ToolCall("f", {"a:b": None, "c": [1, "x"]})


@pytest.mark.parametrize(
    "text",
    [
        "", "f{}", "call:f", "call:{}", "call:f[1]", "call:f{}x", "call:f{a}", "call:f{a:}",
        "call:f{a:1", f"call:f{{a:{Q}x", "call:f{a:b c}", "call:f{a:1,,b:2}", "call:f{a:NaN}",
        "call:f{a:1e999}", 'call:f{a:"x"}', "call:f{:1}",
        "call:f{a:" + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1) + "}",
        "call:f{a:" + "9" * 5000 + "}",
    ],
)  # fmt: skip
def test_text_without_the_format_is_no_call(text):
    assert read_tool_call(text) is None
