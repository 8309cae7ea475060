"""Tests that a tokenizer splits texts before all merges of its vocabulary are found as it does
after that."""

import copy
import pickle
import random
import threading

import pytest
from tiny_tokenizer import TEXTS, gguf_metadata, random_text
from tokenizers import AddedToken

from gemma_fast.checkpoint.gguf_reader import GGUFFile
from gemma_fast.text.gguf_vocab import gguf_backend, gguf_vocabulary
from gemma_fast.text.tokenizer import Tokenizer

FIELDS = (
    "ids", "tokens", "offsets", "type_ids", "attention_mask", "special_tokens_mask", "word_ids",
)  # fmt: skip


@pytest.fixture(scope="module")
def metadata(demo_gguf) -> dict:
    return GGUFFile(demo_gguf).metadata


@pytest.fixture(scope="module")
def complete(metadata) -> Tokenizer:
    return Tokenizer(gguf_backend(metadata, "demo.gguf"), "demo.gguf")


def late(metadata: dict) -> Tokenizer:
    """Returns a tokenizer whose merges are not found yet."""
    backend, merges = gguf_vocabulary(metadata, "demo.gguf")
    assert merges is not None
    return Tokenizer(backend, "demo.gguf", merges=merges)


@pytest.fixture(scope="module")
def demo(metadata) -> Tokenizer:
    return late(metadata)


@pytest.fixture
def tiny() -> Tokenizer:
    return late(gguf_metadata())


def assert_same(found, expected):
    for a, b in zip(found.encodings, expected.encodings, strict=True):
        assert {x: getattr(a, x) for x in FIELDS} == {x: getattr(b, x) for x in FIELDS}


def test_random_texts_are_split_as_with_all_merges(demo, complete, metadata):
    rng = random.Random(0)
    tokens, splits = metadata["tokenizer.ggml.tokens"], 0
    for _ in range(150):
        texts = [random_text(rng, tokens) for _ in range(rng.randint(1, 3))]
        splitter = demo._merges.splitter(texts, demo._backend)
        splits += splitter is not None
        if splitter is not None:
            assert_same(demo(texts), complete(texts))
    assert splits > 100
    assert demo._merges is not None


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_texts_that_hurt_are_split_as_with_all_merges(metadata, complete, text):
    assert_same(late(metadata)([text]), complete([text]))


def test_lookups_do_not_find_the_merges(demo, complete):
    for call in (
        len,
        lambda tokenizer: tokenizer.decode([2, 236777, 1461, 531, 2827, 105, 400_000]),
        lambda tokenizer: tokenizer.convert_ids_to_tokens(range(3000)),
        lambda tokenizer: tokenizer.get_vocab(),
        lambda tokenizer: tokenizer.special_tokens_map,
        lambda tokenizer: [*map(repr, tokenizer.added_tokens_decoder.values())],
        lambda tokenizer: tokenizer.stop_token_ids,
        lambda tokenizer: tokenizer.encode("I want to move"),
        lambda tokenizer: tokenizer.encode(["a", "b"], ["c", "d"]),
    ):
        assert call(demo) == call(complete)
    assert demo._merges is not None
    assert demo._backend.model.tokenize("want") != complete.backend.model.tokenize("want")


def test_backend_has_all_merges(tiny):
    assert tiny.encode("hello") == [2, tiny.token_to_id("hello")]
    assert tiny._merges is not None
    for backend in (tiny.backend, tiny.backend_tokenizer):
        assert [token.value for token in backend.model.tokenize("hello")] == ["hello"]
    assert tiny._merges is None


def test_character_outside_the_vocabulary_needs_all_merges(tiny):
    """Its bytes are pieces that the text does not contain."""
    assert tiny._merges.splitter(["é"], tiny._backend)
    assert tiny._merges.splitter(["éñ"], tiny._backend) is None
    assert tiny.tokenize("ñ") == ["<0xC3>", "<0xB1>"]
    assert tiny._merges is None


def test_long_texts_need_all_merges(tiny):
    tiny._merges._parts_left = 100 * tiny._merges._longest
    for _ in range(10):
        tiny.encode("hello the ")
        assert tiny._merges is not None
    ids = tiny.encode("hello the ")
    assert tiny._merges is None
    assert ids == tiny.encode("hello the ")


ADDED = {
    "new": AddedToken("<new>"), "special": AddedToken("<new>", special=True),
    "spaces": AddedToken("a  b", normalized=False), "normalized": AddedToken("a b"),
    "single word": AddedToken("the", single_word=True), "strips": AddedToken("<x>", lstrip=True),
    "strips right": AddedToken("<x>", rstrip=True, normalized=False), "piece": AddedToken("hello"),
}  # fmt: skip


@pytest.mark.parametrize("token", ADDED.values(), ids=ADDED)
def test_added_tokens_keep_their_ids_and_flags(tiny, token):
    complete = Tokenizer(gguf_backend(gguf_metadata(), "tiny.gguf"), "tiny.gguf")
    for tokenizer in (tiny, complete):
        tokenizer.add_tokens([AddedToken("<first>"), token])
    for text in ("hello the<new> a  b", "a b  <x>  the", "<b>the hello<first> the", "the<x>  "):
        assert_same(tiny([text]), complete([text]))
    assert tiny._merges is not None


def test_merges_of_equal_scores_keep_their_order():
    metadata = gguf_metadata()
    metadata["tokenizer.ggml.scores"] = [0.0] * len(metadata["tokenizer.ggml.scores"])
    complete = Tokenizer(gguf_backend(metadata, "tiny.gguf"), "tiny.gguf")
    rng = random.Random(1)
    for _ in range(100):
        text = random_text(rng, ["▁the", "hello", "er", "▁win", "in", "ll"])
        text = "".join(x for x in text if x in complete.get_vocab() or x == " ")
        tiny = late(metadata)
        assert tiny.encode(text) == complete.encode(text)
        assert tiny._merges is not None


def test_a_copy_is_independent(tiny):
    tiny._merges.file = threading.Lock()  # cannot be copied
    for other in (copy.deepcopy(tiny), pickle.loads(pickle.dumps(tiny))):
        assert other.encode("hello") == tiny.encode("hello")
        assert [token.value for token in other.backend.model.tokenize("hello")] == ["hello"]
        assert tiny._merges is not None
