"""Checks that encode and decode give the same results as transformers. Also checks that bad files
and arguments are refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_tokenizer import TEXTS, tiny_backend, write_tokenizer
from tokenizers import normalizers

import gemma_fast.text.tokenizer
from gemma_fast.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tokenizer:
    return Tokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    from transformers import GemmaTokenizer

    return GemmaTokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("judge")))


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_decode_inverts_encode(tiny, text):
    assert tiny.decode(tiny.encode(text)) == "<bos>" + text


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_encode_and_decode_equal_transformers(tiny, judge, text):
    assert tiny.encode(text) == judge.encode(text)
    assert tiny.encode(text, add_special_tokens=False) == judge.encode(
        text, add_special_tokens=False
    )
    ids = tiny.encode(text)
    assert tiny.decode(ids, skip_special_tokens=True) == judge.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {}}', '{"model": null}'])
def test_unreadable_tokenizer_json_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a readable tokenizer"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:.*has no post_processor")
def test_missing_tokenizer_json_or_special_token_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"] = {"<pad>": 0, "<eos>": 1, "<unk>": 3}
    content["model"]["merges"] = content["added_tokens"] = []
    content["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer\.json.*lacks \['<bos>'\]"):
        Tokenizer.from_pretrained(tmp_path)


def test_file_cannot_set_normalizer_truncation_or_padding(tiny):
    backend = tiny_backend()
    backend.normalizer = normalizers.Lowercase()
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    assert Tokenizer(backend, "odd").encode("HI the") == tiny.encode("HI the")


@pytest.mark.parametrize("text", ["<bos>the", "the", "", "<bos>"])
def test_encode_adds_bos_exactly_once(tiny, text):
    assert tiny.encode(text).count(2) == 1
    assert tiny.encode(text)[0] == 2


def test_call_equals_transformers(tiny, judge):
    texts = ["hello the world", "é", ""]
    for text in (texts, texts[0]):
        assert dict(tiny(text)) == dict(judge(text))
    assert dict(tiny(texts, padding=True)) == dict(judge(texts, padding=True))

    encoding = tiny(texts, return_tensors="pt", padding=True)
    theirs = judge(texts, return_tensors="pt", padding=True)
    assert encoding.input_ids is encoding["input_ids"]
    for name in ("input_ids", "attention_mask"):
        assert encoding[name].dtype == theirs[name].dtype == torch.int64
        assert encoding[name].equal(theirs[name])
    assert encoding.input_ids[1, :-2].eq(tiny.pad_token_id).all(), "padding must be on the left"
    assert set({**encoding.to("meta")}) == {"input_ids", "attention_mask"}
    assert encoding.to("meta").input_ids.device.type == "meta"
    assert tiny("a", return_tensors="pt", add_special_tokens=False).input_ids.shape == (1, 1)
    with pytest.raises(AttributeError, match="token_type_ids"):
        _ = encoding.token_type_ids


def test_bad_arguments_are_refused(tiny):
    with pytest.raises(ValueError, match="padding=True"):
        tiny(["a", "the world"], return_tensors="pt")
    with pytest.raises(ValueError, match="no texts"):
        tiny([], return_tensors="pt", padding=True)
    for text in ("\ud800", None, b"a"):
        with pytest.raises(ValueError, match=r"valid Unicode|must be a str or a list of str"):
            tiny.encode(text)
    for ids in ([-1], [[-1]], ["a"], [2**40], [None]):
        with pytest.raises(ValueError, match="token ids"):
            tiny.decode(ids)


def test_decode_accepts_ids_and_tensors(tiny):
    ids = tiny("the hello", return_tensors="pt").input_ids
    assert tiny.decode(ids[0]) == "<bos>the hello"
    assert tiny.decode(ids[0, 1]) == tiny.decode(int(ids[0, 1])) == "the"
    assert tiny.batch_decode(ids, skip_special_tokens=True) == ["the hello"]
    assert tiny.convert_tokens_to_ids(["<end_of_turn>", "nothing"]) == [106, tiny.unk_token_id]
    assert tiny.token_to_id("nothing") is None


def test_import_does_not_load_optional_packages():
    """The tokenizer never imports transformers. It imports Jinja and gguf only when it needs
    them."""
    few = "{'transformers', 'jinja2', 'gguf'}"
    code = f"import sys, gemma_fast.text.tokenizer; print({few} & {{*sys.modules}})"
    root = Path(gemma_fast.text.tokenizer.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
