"""Checks that a tokenizer.json that is made to take long is refused soon."""

import json
import time

import pytest
from tiny_tokenizer import write_tokenizer

from gemma_fast.text.tokenizer import Tokenizer


def special(token: str) -> dict:
    return {"SpecialToken": {"id": token, "type_id": 0}}


def text(name: str) -> dict:
    return {"Sequence": {"id": name, "type_id": 0}}


def template(single: list, ids: int = 1) -> dict:
    token = {"id": "<bos>", "ids": [2] * ids, "tokens": ["<bos>"] * ids}
    return {"type": "TemplateProcessing", "single": single, "pair": [text("A"), text("B")],
            "special_tokens": {"<bos>": token}}  # fmt: skip


BOMBS = {
    "many special tokens": template([special("<bos>")] * 1_000_000 + [text("A")], 100),
    "long special token": template([special("<bos>"), text("A")], 10_000),
    "repeats the text": {
        "type": "Sequence", "processors": [template([special("<bos>")] + [text("A")] * 9)] * 9,
    },
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_large_post_processor_is_refused_soon(tmp_path, bomb):
    write_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["post_processor"] = BOMBS[bomb]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    start = time.monotonic()
    with pytest.raises(
        ValueError, match=r"tokenizer\.json: post_processor has .*(16384|the limit is once)"
    ):
        Tokenizer.from_pretrained(tmp_path)
    assert time.monotonic() - start < 10


def test_many_added_tokens_in_tokenizer_json_are_refused_soon(tmp_path):
    write_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    token = content["added_tokens"][0]
    content["added_tokens"] += [
        token | {"id": 475 + i, "content": f"<t{i}>"} for i in range(400_000)
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"added_tokens has 400111 tokens; the limit is 32768"):
        Tokenizer.from_pretrained(tmp_path)
    assert time.monotonic() - start < 10
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"tokenizer\.json is 1099511627776 bytes long"):
        Tokenizer.from_pretrained(tmp_path)
