"""Checks the tokenizer of Gemma 4: its files against transformers, its GGUF metadata against the
algorithm of llama.cpp (llm_tokenizer_bpe_session and LLAMA_VOCAB_PRE_TYPE_GEMMA4)."""

import itertools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import transformers
from tiny_gemma4 import (
    CONFIG,
    CONTROL_TOKENS,
    MERGES,
    TEMPLATE,
    VISIBLE,
    gguf_metadata,
    tiny_backend,
    write_tokenizer,
)
from tiny_tokenizer import CONTROL, NORMAL, TEXTS, random_text
from tokenizers import Regex, pre_tokenizers

from gemma_fast.checkpoint.config_gguf import generation_from_gguf
from gemma_fast.text.gguf_settings import GEMMA_4_TOKENS, gguf_settings
from gemma_fast.text.gguf_vocab import gguf_backend
from gemma_fast.text.tokenizer import Tokenizer

STOPS = [1, 50, 106]
TEXTS_4 = TEXTS | {
    "runs of newlines": "\na\n\nb" + "\n" * 3 + " \n \n" + "\n" * 4 + "c" + "\n" * 9,
    "HTML": "<p></s></p>",
    "turns": '<|turn>user\nhello<turn|>\n<|tool_call>call:f{a:<|"|>b<|"|>}<tool_call|>',
}
PIECES = ["▁the", "hello", "\n\n\n", "</s>", "<|turn>", "<turn|>", "<|channel>", "<bos>", "<0x41>"]


@pytest.fixture(scope="module", params=[False, True], ids=["it", "base"])
def path(request, tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tiny"), bos=request.param)


def from_gguf(**keys) -> Tokenizer:
    metadata = gguf_metadata() | {f"tokenizer.ggml.{k}": v for k, v in keys.items()}
    backend = gguf_backend(metadata, "tiny.gguf")
    settings = gguf_settings(metadata, backend, "tiny.gguf")
    return Tokenizer(backend, "tiny.gguf", model_type="gemma4", settings=settings)


@pytest.mark.parametrize("text", TEXTS_4.values(), ids=TEXTS_4)
def test_ids_and_text_equal_transformers(ours, judge, text):
    ids = ours.encode(text)
    assert ids == judge.encode(text)
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == judge.decode(
            ids, skip_special_tokens=skip
        )


def test_named_tokens_equal_transformers(ours, judge):
    assert ours.special_tokens_map == judge.special_tokens_map
    assert ours.all_special_ids == judge.all_special_ids
    assert ours.think_token_id == judge.think_token_id == 98
    texts = ["hello", "a\n\nb"]
    assert dict(ours(texts, padding=True)) == dict(judge(texts, padding=True))


@pytest.mark.parametrize("text", ["the", "", "<bos>the", "<bos>"])
def test_require_bos_gives_each_text_one_bos(path, judge, text):
    tokenizer = Tokenizer.from_pretrained(path)
    plain = tokenizer.encode(text)
    tokenizer.require_bos()
    ids = tokenizer.encode(text)
    assert (ids[0], ids.count(2)) == (2, 1)
    assert plain == judge.encode(text) or text.startswith("<bos>")
    assert ids[1:] == [token for token in plain if token != 2]


def test_require_bos_changes_no_other_family():
    from tiny_tokenizer import tiny_backend as gemma_3

    tokenizer = Tokenizer(gemma_3(), "tiny", settings={"add_bos_token": False})
    tokenizer.require_bos()
    assert not tokenizer.add_bos_token


def test_texts_end_at_the_tokens_of_gemma_4(ours):
    assert ours.stop_token_ids == from_gguf().stop_token_ids == STOPS
    assert generation_from_gguf(gguf_metadata())["eos_token_id"] == STOPS
    end = ours.encode("</s>", add_special_tokens=False)
    assert len(end) == 1 and ours.decode(end, skip_special_tokens=True) == "</s>"


@pytest.mark.parametrize("split", [r"\n+|[^\n]+", r"[^\n]+|[\n]+"])
def test_split_at_newlines_is_applied_as_in_transformers(tmp_path, split):
    """A class without a pipeline of its own has that of the file."""
    write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["pre_tokenizer"] = json.loads(
        pre_tokenizers.Split(Regex(split), "isolated").__getstate__()
    )
    tokens = content["model"]["vocab"]
    tokens["a\n"] = len(tokens)
    content["model"]["merges"].insert(0, ["a", "\n"])
    file.write_text(json.dumps(content))
    for name in ("TokenizersBackend", "GemmaTokenizer"):
        config = CONFIG | {"tokenizer_class": name}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        ours = Tokenizer.from_pretrained(tmp_path)
        judge = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in ("a\na\n\nthe", "a"):
            assert ours.encode(text) == judge.encode(text), name
        assert (tokens["a\n"] in ours.encode("a\n")) == (name == "GemmaTokenizer")


def llama_cpp(metadata: dict) -> Callable[[str], list[str]]:
    """Returns a function that splits text without special tokens as llama.cpp does."""
    tokens = set(metadata["tokenizer.ggml.tokens"])
    ranks = {tuple(m.split(" ", 1)): i for i, m in enumerate(metadata["tokenizer.ggml.merges"])}

    def merge(word: str) -> list[str]:
        if not word.strip("\n") and word in tokens:
            return [word]
        parts = [*word]
        while pairs := [
            (ranks[a, b], i)
            for i, (a, b) in enumerate(itertools.pairwise(parts))
            if (a, b) in ranks
        ]:
            i = min(pairs)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts

    def cut(text: str) -> list[str]:
        parts = [p for w in re.findall(r"[^\n]+|\n+", text.replace(" ", "▁")) for p in merge(w)]
        return [
            token
            for part in parts
            for token in ([part] if part in tokens else [f"<0x{b:02X}>" for b in part.encode()])
        ]

    return cut


def test_gguf_vocabulary_splits_text_as_llama_cpp_does():
    metadata = gguf_metadata()
    metadata["tokenizer.ggml.tokens"] += ["a\n"]  # no line ends with it, as lines are split off
    metadata["tokenizer.ggml.token_type"] += [NORMAL]
    metadata["tokenizer.ggml.merges"] += ["a \n"]
    judge = llama_cpp(metadata)
    tokenizer = Tokenizer(gguf_backend(metadata, "tiny.gguf"), "tiny.gguf")
    rng = random.Random(0)
    for _ in range(300):
        text = random_text(rng, ["▁the", "hello", "\n\n\n", "</s>", "éé", "▁▁", "a\n"])
        assert tokenizer.tokenize(text) == judge(text), repr(text)


def test_gguf_tokenizer_equals_tokenizer_json():
    tokenizer, judge = from_gguf(), Tokenizer(tiny_backend(bos=True), "tokenizer.json")
    rng = random.Random(0)
    for _ in range(300):
        ids = judge.encode(text := random_text(rng, PIECES))
        assert tokenizer.encode(text) == ids, repr(text)
    assert tokenizer.chat_template == TEMPLATE


def test_gguf_file_is_read(tmp_path):
    metadata = gguf_metadata()
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "gemma4")
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(metadata["tokenizer.ggml.tokens"])
    writer.add_token_scores(metadata["tokenizer.ggml.scores"])
    writer.add_token_types(metadata["tokenizer.ggml.token_type"])
    writer.add_token_merges(metadata["tokenizer.ggml.merges"])
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = Tokenizer.from_pretrained(tmp_path / "tiny.gguf")
    for text in TEXTS_4.values():
        assert tokenizer.encode(text) == from_gguf().encode(text)


def test_tokens_that_llama_cpp_shows_are_special():
    """The converter marks some control tokens as user-defined, which would be shown as text."""
    tokenizer = from_gguf()
    named = {*CONTROL_TOKENS, *VISIBLE}
    assert named <= {*tokenizer.all_special_ids}
    assert tokenizer.decode([*named], skip_special_tokens=True) == ""
    assert GEMMA_4_TOKENS.items() >= {
        (name, token) for name, token in CONFIG.items() if str(token)[-1:] == ">"
    } - {(f"{x}_token", f"<{x}>") for x in ("bos", "eos", "pad", "unk", "mask")}
    assert tokenizer.eoc_token_id == 101


def test_bos_is_added_whatever_a_gguf_file_says():
    with pytest.warns(UserWarning, match=r"tiny\.gguf: .*add_bos_token is false, but Gemma 4"):
        tokenizer = from_gguf(add_bos_token=False)
    assert tokenizer.encode("</s>")[0] == 2


def test_space_prefix_has_no_effect(recwarn):
    metadata = gguf_metadata() | {"tokenizer.ggml.add_space_prefix": True}
    backend = gguf_backend(metadata, "tiny.gguf")
    gguf_settings(metadata, backend, "tiny.gguf")
    del metadata["tokenizer.ggml.add_space_prefix"], metadata["tokenizer.ggml.scores"]
    backend = gguf_backend(metadata, "tiny.gguf")
    settings = gguf_settings(metadata, backend, "tiny.gguf")
    tokenizer = Tokenizer(backend, "tiny.gguf", settings=settings)
    assert tokenizer.tokenize("hello") == ["hello"]
    assert not recwarn


FIRST = " ".join(MERGES[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merges": None}, "merges must be a non-empty list of str"),
        ({"merges": []}, "merges must be a non-empty list of str"),
        ({"merges": [FIRST, 1]}, "merges must be a non-empty list of str"),
        ({"merges": ["hello"]}, "merges has 'hello': it must be two tokens with a space between"),
        ({"merges": ["h "]}, "merges has 'h ': it must be two tokens"),
        ({"merges": [" h"]}, "merges has ' h': it must be two tokens"),
        ({"merges": [""]}, "merges has '': it must be two tokens"),
        ({"merges": ["h nothing"]}, "merges has 'h nothing': it must be two tokens"),
        ({"merges": ["e h"]}, "merges has 'e h': it must be two tokens"),
        ({"merges": ["h e x"]}, "merges has 'h e x': it must be two tokens"),
        ({"merges": [FIRST, FIRST]}, "merges contains a merge twice"),
        ({"merges": [FIRST] * ((1 << 20) + 1)}, "merges has 1048577 merges; the limit is 1048576"),
        ({"token_type": [CONTROL]}, "tokens, 1 token types: the numbers must be equal"),
        ({"model": "gemma5"}, "model is 'gemma5', but Gemma's is one of llama, gemma4"),
        ({"model": ["gemma4"]}, "but Gemma's is one of llama, gemma4"),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else next(iter(value)),
)
def test_malformed_metadata_is_refused(change, message):
    metadata = gguf_metadata() | {f"tokenizer.ggml.{k}": v for k, v in change.items()}
    with pytest.raises(ValueError, match=rf"bad\.gguf: .*{message}"):
        gguf_backend(metadata, "bad.gguf")
