"""Checks that what the tokenizer cannot do is refused with a message that names the way out."""

import pytest
import torch
from tiny_tokenizer import tiny_backend

from gemma_fast.text.tokenizer import Tokenizer


@pytest.fixture
def ours() -> Tokenizer:
    return Tokenizer(tiny_backend(), "tiny", settings={"extra_special_tokens": ["<unused1>"]})


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"return_overflowing_tokens": True}, TypeError, "not supported: split the ids"),
        ({"is_split_into_words": True}, TypeError, "not supported: join the words"),
        ({"split_special_tokens": True}, TypeError, "transformers.AutoTokenizer, whose tensors"),
        ({"max_target_length": 3}, TypeError, "call the tokenizer a second time"),
        ({"nonsense": 1}, TypeError, "unexpected keyword argument 'nonsense'"),
        ({"padding": "widest"}, ValueError, "padding must be a bool"),
        ({"padding": "maxlength"}, ValueError, "^padding must be .*, not 'maxlength'$"),
        ({"padding_side": "top"}, ValueError, "^padding_side must be \"left\" or .*, not 'top'$"),
        ({"text_pair": 3}, ValueError, "text_pair must be a str or a list of str, not 3"),
        ({"text_target": 3.5}, ValueError, "text must be a str or a list of str, not 3.5"),
        ({"truncation": "middle"}, ValueError, "truncation must be one of"),
        ({"return_tensors": "tf"}, ValueError, "must be None, \"pt\" or \"np\", not 'tf'"),
        ({"text_pair": "b", "max_length": 2}, ValueError, "pairs is not supported: truncate them"),
        ({"text_pair": ["b", "c"]}, ValueError, "1 texts and 2 text pairs"),
        (
            {"padding": True, "truncation": True, "max_length": 9, "pad_to_multiple_of": 8},
            ValueError, "9 tokens is not a multiple of pad_to_multiple_of=8",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_unsupported_options_name_a_way_out(ours, keywords, error, message):
    with pytest.raises(error, match=message):
        ours("hello the", **keywords)


@pytest.mark.parametrize(
    "text", [3, None, b"a", {"a": "b"}, object()], ids=lambda x: type(x).__name__
)
def test_what_is_no_text_is_refused(ours, text):
    with pytest.raises(ValueError, match="text must be a str or a list of str, not"):
        ours(text)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("pad_token", 3, "pad_token must be a str or an AddedToken, not 3"),
        ("pad_token_id", "a", "pad_token_id='a' is not an id of the vocabulary"),
        ("pad_token_id", -1, "pad_token_id=-1 is not an id of the vocabulary"),
        ("pad_token_id", 10**6, "pad_token_id=1000000 is not an id of the vocabulary"),
        ("padding_side", "top", 'padding_side must be "left" or "right", not \'top\''),
        ("truncation_side", None, 'truncation_side must be "left" or "right", not None'),
        ("extra_special_tokens", [3], "extra_special_tokens must be a str or an AddedToken, not 3"),
    ],
)
def test_bad_value_of_an_attribute_is_refused_when_it_is_set(ours, name, value, message):
    before = getattr(ours, name)
    with pytest.raises(ValueError, match=message):
        setattr(ours, name, value)
    assert getattr(ours, name) == before


def test_added_tokens_must_be_text(ours):
    for call in (ours.add_tokens, lambda x: ours.add_special_tokens({"pad_token": x})):
        with pytest.raises(ValueError, match="a token must be a str or an AddedToken, not 3"):
            call(3)


def test_ids_stay_integers_when_an_encoding_changes_its_dtype(ours):
    inputs = ours("hello", return_tensors="pt")
    for moved in (inputs.to("cpu", dtype=torch.float16), inputs.to(torch.float16)):
        assert {tensor.dtype for tensor in moved.values()} == {torch.int64}
        assert moved.input_ids.equal(inputs.input_ids)


def test_tokenizer_prints_in_a_few_words(ours):
    text = repr(ours)
    assert text.startswith(f"Tokenizer({ours.source!r}, vocab_size=475")
    assert "'eos_token': '<eos>'" in text and len(text) < 500
