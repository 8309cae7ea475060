"""Checks that each call and attribute of transformers' fast tokenizer gives the same result here,
or raises an error that names what to use instead."""

import copy
import inspect
import json
import pickle
import random

import numpy as np
import pytest
import torch
import transformers
from tiny_tokenizer import TEXTS, random_text, tiny_backend, write_tokenizer
from tokenizers import AddedToken

from gemma_fast.text.keywords import ATTRIBUTES
from gemma_fast.text.tokenizer import Tokenizer

CONFIG = {
    "mask_token": "<unused0>", "model_max_length": 12, "eos_token": "<end_of_turn>",
    "extra_special_tokens": ["<unused1>"], "boi_token": "<start_of_image>", "add_bos_token": True,
}  # fmt: skip
SEVERAL = ["hello the world", "é", "a <end_of_turn> b", "in the thinner the winner in the"]
CALLS = {
    "one text": ("hello the", {}),
    "empty": ("", {}),
    "several": (SEVERAL, {}),
    "no special tokens": (SEVERAL, {"add_special_tokens": False}),
    "longest": (SEVERAL, {"padding": "longest"}),
    "max_length": (SEVERAL[:3], {"padding": "max_length", "max_length": 14}),
    "max_length of the file": (SEVERAL[:2], {"padding": "max_length"}),
    "multiple": (SEVERAL, {"padding": True, "pad_to_multiple_of": 8}),
    "right": (SEVERAL, {"padding": True, "padding_side": "right"}),
    "truncation": (SEVERAL, {"truncation": True, "max_length": 5}),
    "truncation of the file": (SEVERAL, {"truncation": True}),
    "max_length alone": (SEVERAL, {"max_length": 4}),
    "longest_first": ("hello the world", {"truncation": "longest_first", "max_length": 3}),
    "truncation to one": ("hello the world", {"truncation": True, "max_length": 1}),
    "truncation and padding": (
        SEVERAL, {"truncation": True, "max_length": 6, "padding": "max_length",
                  "return_tensors": "pt", "return_special_tokens_mask": True,
                  "return_offsets_mapping": True, "return_length": True},
    ),
    "pt": (SEVERAL, {"padding": True, "return_tensors": "pt"}),
    "np": (SEVERAL, {"padding": True, "return_tensors": "np"}),
    "enum": (
        SEVERAL,
        {"padding": transformers.utils.PaddingStrategy.LONGEST,
         "return_tensors": transformers.TensorType.PYTORCH},
    ),
    "everything": (
        "a é <end_of_turn>the",
        {"return_special_tokens_mask": True, "return_offsets_mapping": True,
         "return_length": True, "return_token_type_ids": True},
    ),
    "no mask": ("hello", {"return_attention_mask": False}),
    "pair": ("hello", "the world", {"return_token_type_ids": True}),
    "pairs": (SEVERAL[:2], ["a", "b"], {"padding": True, "return_tensors": "pt"}),
    "target": ("hello", {"text_target": "the world"}),
    "targets": (SEVERAL, {"text_target": SEVERAL, "padding": True, "return_tensors": "pt"}),
    "only a target": ({"text_target": "the world"},),
    "tokenizer_kwargs": ("hello the", {"tokenizer_kwargs": {"max_length": 2}}),
    "harmless": ("hello", {"verbose": False, "split_special_tokens": False, "stride": 0}),
}  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = write_tokenizer(tmp_path_factory.mktemp("tiny"))
    (path / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.fixture
def ours(path) -> Tokenizer:
    return Tokenizer.from_pretrained(path)


@pytest.fixture
def judge(path):
    return transformers.AutoTokenizer.from_pretrained(path)


def same(actual, expected) -> None:
    if isinstance(expected, dict | transformers.BatchEncoding):
        assert {*actual} == {*expected}
        for name in expected:
            same(actual[name], expected[name])
    elif isinstance(expected, torch.Tensor | np.ndarray):
        assert type(actual) is type(expected) and actual.dtype == expected.dtype
        assert actual.tolist() == expected.tolist()
    else:
        assert actual == expected


def call(tokenizer, arguments, method=None):
    *positional, keywords = arguments
    return (tokenizer if method is None else getattr(tokenizer, method))(*positional, **keywords)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("arguments", CALLS.values(), ids=CALLS)
def test_call_equals_transformers(ours, judge, arguments, side):
    ours.truncation_side = judge.truncation_side = ours.padding_side = judge.padding_side = side
    same(call(ours, arguments), call(judge, arguments))


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_offsets_equal_transformers(ours, judge, text):
    options = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    expected = judge(text, **options)
    same(ours(text, **options), expected)
    assert ours(text).tokens() == expected.tokens()
    assert ours.tokenize(text) == judge.tokenize(text)


@pytest.mark.slow
def test_real_vocabulary_gives_the_results_of_transformers(demo_gguf, tmp_path):
    demo = Tokenizer.from_pretrained(demo_gguf)
    demo.backend.post_processor = tiny_backend().post_processor
    demo.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "gemma3"}')
    ours = Tokenizer.from_pretrained(tmp_path)
    judge = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rng, pieces = random.Random(0), list(judge.get_vocab())
    texts = [*TEXTS.values(), *(random_text(rng, pieces) for _ in range(300))]
    options = {"return_offsets_mapping": True, "return_special_tokens_mask": True, "padding": True}
    for more in ({}, {"truncation": True, "max_length": 9}):
        expected = judge(texts, **options, **more)
        same(ours(texts, **options, **more), expected)
        for skip in (False, True):
            rows = expected.input_ids
            assert ours.decode(rows, skip) == judge.decode(rows, skip_special_tokens=skip)
    assert ours.special_tokens_map == judge.special_tokens_map
    assert ours.all_special_ids == judge.all_special_ids
    assert len(ours) == len(judge) == 262144


IDS = [2, 106, 400, 3, 7]
METHODS = {
    "tokenize": ("hello <eos> the", {}),
    "encode": ("hello the", {"max_length": 2, "truncation": True}),
    "decode": ([[2, 400], [106, 401]], {}),
    "batch_decode": (np.array([[2, 400], [106, 401]]), {"skip_special_tokens": True}),
    "convert_ids_to_tokens": (IDS, {"skip_special_tokens": True}),
    "convert_tokens_to_ids": (["<eos>", "the", "nothing"], {}),
    "convert_tokens_to_string": (["▁the", "<0xC3>", "<0xA9>"], {}),
    "get_vocab": ({},),
    "get_added_vocab": ({},),
    "num_special_tokens_to_add": ({},),
    "get_special_tokens_mask": (IDS, {"already_has_special_tokens": True}),
    "add_tokens": (["<new>", "the"], {}),
    "add_special_tokens": ({"pad_token": "[PAD]", "additional_special_tokens": ["<a>"]}, {}),
    "pad": ([{"input_ids": [5, 6]}, {"input_ids": [7]}], {"return_tensors": "pt"}),
    "get_chat_template": ("{{ 1 }}", {}),
}


@pytest.mark.parametrize("method", METHODS)
def test_method_equals_transformers(ours, judge, method):
    same(call(ours, METHODS[method], method), call(judge, METHODS[method], method))
    assert len(ours) == len(judge)
    assert ours.special_tokens_map == judge.special_tokens_map
    assert ours.all_special_ids == judge.all_special_ids
    assert ours.extra_special_tokens == judge.extra_special_tokens
    assert ours("hello <new> <a>").input_ids == judge("hello <new> <a>").input_ids


@pytest.mark.parametrize(
    "name",
    [
        "bos_token", "eos_token", "unk_token", "pad_token", "mask_token", "sep_token", "cls_token",
        "bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id", "mask_token_id",
        "sep_token_id", "boi_token", "boi_token_id", "extra_special_tokens",
        "extra_special_tokens_ids", "all_special_tokens", "all_special_ids", "special_tokens_map",
        "model_max_length", "model_input_names", "padding_side", "truncation_side", "vocab_size",
        "vocab", "added_tokens_encoder", "is_fast", "name_or_path", "chat_template",
        "pad_token_type_id", "clean_up_tokenization_spaces", "split_special_tokens", "init_inputs",
        "max_len_single_sentence", "max_len_sentences_pair", "chat_control_tokens", "verbose",
    ],
)  # fmt: skip
def test_attribute_equals_transformers(ours, judge, name):
    same(getattr(ours, name), getattr(judge, name))


def test_added_tokens_equal_transformers(ours, judge):
    assert str(ours.added_tokens_decoder) == str(judge.added_tokens_decoder)


def test_every_attribute_of_transformers_exists_or_names_a_way_out(ours, judge):
    """A new attribute of transformers' tokenizer must be supported, or listed in keywords.py."""
    names = {name for name in dir(judge) if not name.startswith("_")} | set(
        judge.special_tokens_map
    )
    for name in names:
        if not hasattr(ours, name):
            assert name in ATTRIBUTES, f"{name} is missing"
            with pytest.raises(AttributeError, match=f"has no {name}: "):
                getattr(ours, name)
    for name in ATTRIBUTES:
        assert not hasattr(ours, name), f"{name} exists, so it need not be listed"


@pytest.mark.parametrize(
    "method", ["__call__", "encode", "decode", "batch_decode", "pad", "tokenize",
               "apply_chat_template", "convert_ids_to_tokens", "add_tokens", "add_special_tokens",
               "get_special_tokens_mask", "num_special_tokens_to_add"],
)  # fmt: skip
def test_every_parameter_of_transformers_is_accepted(ours, judge, method):
    """With its default value, a parameter must be accepted."""
    parameters = inspect.signature(getattr(judge, method)).parameters.values()
    own = inspect.signature(getattr(ours, method)).parameters
    for parameter in parameters:
        if parameter.name in own or parameter.kind == parameter.VAR_KEYWORD:
            continue
        given = {parameter.name: parameter.default}
        {
            "__call__": lambda given=given: ours("hello", **given),
            "encode": lambda given=given: ours.encode("hello", **given),
            "decode": lambda given=given: ours.decode([2], **given),
            "batch_decode": lambda given=given: ours.batch_decode([[2]], **given),
        }[method]()


def test_names_can_be_set_as_in_transformers(ours, judge):
    for tokenizer in (ours, judge):
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.sep_token = AddedToken("<unused2>")
        tokenizer.mask_token_id = 9
        tokenizer.cls_token = None
        tokenizer.extra_special_tokens = ["<unused3>"]
        tokenizer.boi_token = "<unused4>"
        tokenizer.model_max_length = 5
    assert ours.special_tokens_map == judge.special_tokens_map
    assert ours.all_special_ids == judge.all_special_ids
    same(ours(SEVERAL, padding=True), judge(SEVERAL, padding=True))
    same(ours(SEVERAL, truncation=True), judge(SEVERAL, truncation=True))
    with pytest.raises(ValueError, match="pad_token='nothing' is not in the vocabulary: use one"):
        ours.pad_token = "nothing"
    for wrong in (1 << 20, -1, "x"):
        with pytest.raises(
            ValueError, match=f"pad_token_id={wrong!r} is not an id of the vocabulary"
        ):
            ours.pad_token_id = wrong
    ours.pad_token_id = None
    assert ours.pad_token is None and ours.pad_token_id is None
    with pytest.raises(ValueError, match="padding needs a pad token: set pad_token"):
        ours(SEVERAL, padding=True)


def test_pad_equals_transformers(ours, judge):
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1], "special_tokens_mask": [0, 1, 0]},
            {"input_ids": [8], "attention_mask": [1], "special_tokens_mask": [0]}]  # fmt: skip
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    for given in (rows, columns, rows[0], ours(SEVERAL), {"input_ids": [torch.tensor([4, 5])] * 2}):
        for options in ({}, {"padding": "max_length", "max_length": 6, "padding_side": "right"},
                        {"pad_to_multiple_of": 4}):  # fmt: skip
            same(
                ours.pad(copy.deepcopy(given), **options),
                judge.pad(
                    dict(copy.deepcopy(given)) if not isinstance(given, list) else given, **options
                ),
            )
    assert (
        ours.pad({"input_ids": [[1], [2, 3]], "labels": [0, 1]}, return_tensors="pt")
        .labels.eq(torch.tensor([0, 1]))
        .all()
    )
    with pytest.raises(ValueError, match=r"pad\(\) needs input_ids, but .*'ids'"):
        ours.pad({"ids": [1]})


def test_encoding_has_the_methods_of_transformers(ours, judge):
    text = "é the <end_of_turn>"
    mine, theirs = ours([text, "a"]), judge([text, "a"])
    assert mine.tokens(1) == theirs.tokens(1)
    assert mine[0].tokens == theirs[0].tokens and mine.is_fast
    assert [row.ids for row in mine[:1]] == [row.ids for row in theirs[:1]]
    assert mine.data == theirs.data
    for i in range(len(text)):
        assert mine.char_to_token(i) == theirs.char_to_token(i)
        assert mine.char_to_token(0, i) == theirs.char_to_token(0, i)
    assert tuple(mine.token_to_chars(2)) == tuple(theirs.token_to_chars(2))
    tensors = ours(text).convert_to_tensors("pt", prepend_batch_axis=True)
    same(tensors, judge(text).convert_to_tensors("pt", prepend_batch_axis=True))
    assert tensors.to("cpu", non_blocking=True).encodings is tensors.encodings
    with pytest.raises(AttributeError, match=r"no 'word_ids', only input_ids, .*encodings\[i\]"):
        mine.word_ids(0)
    chat = ours.apply_chat_template(
        [{"role": "user", "content": "a"}], chat_template="<bos>{{ 1 }}"
    )
    assert not chat.is_fast
    with pytest.raises(KeyError, match="only the result of tokenizer"):
        chat.tokens()


def test_special_tokens_can_be_added_around_a_text(ours):
    plain = ours.encode("the", add_special_tokens=False)
    ours.add_eos_token = True
    assert ours.encode("the") == [2, *plain, 106]
    assert (ours.add_bos_token, ours.add_eos_token) == (True, True)
    assert ours.num_special_tokens_to_add() == 2
    ours.add_bos_token = False
    assert ours.encode("<bos>the") == [2, *plain, 106]
    assert ours.encode("the", truncation=True, max_length=1) == [106]
    ours.add_bos_token = True
    assert ours.encode("<bos>the") == [2, *plain, 106]
    assert ours("<bos>the", return_special_tokens_mask=True).special_tokens_mask == [1, 0, 1]


@pytest.mark.parametrize("way", ["copy", "deepcopy", "pickle"])
def test_tokenizer_can_be_copied(ours, way):
    again = pickle.loads(pickle.dumps(ours)) if way == "pickle" else getattr(copy, way)(ours)
    assert again.encode("é the <eos>") == ours.encode("é the <eos>")
    assert again.special_tokens_map == ours.special_tokens_map
    assert again.apply_chat_template(
        [{"role": "user", "content": "a"}], chat_template="<bos>{{ 1 }}"
    )
    assert pickle.loads(pickle.dumps(ours("a"))) == ours("a")
