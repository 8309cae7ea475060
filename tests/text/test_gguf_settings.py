"""Checks that a GGUF file's tokenizer.* keys have the effect that they have in llama.cpp.

Source: src/llama-vocab.cpp and src/llama-arch.cpp.
"""

import pytest
from gguf import Keys
from tiny_tokenizer import gguf_metadata

from gemma_fast.text.gguf_settings import KNOWN, gguf_settings
from gemma_fast.text.gguf_vocab import gguf_backend
from gemma_fast.text.tokenizer import Tokenizer


def load(**keys) -> Tokenizer:
    metadata = gguf_metadata() | {f"tokenizer.ggml.{k}": v for k, v in keys.items()}
    backend = gguf_backend(metadata, "tiny.gguf")
    settings = gguf_settings(metadata, backend, "tiny.gguf")
    return Tokenizer(backend, "tiny.gguf", settings=settings)


def test_token_ids_name_the_special_tokens():
    tokenizer = load(
        bos_token_id=5, eos_token_id=106, padding_token_id=1, unknown_token_id=3, mask_token_id=7,
        seperator_token_id=8,
    )  # fmt: skip
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert ids == [5, 106, 1]
    assert (tokenizer.mask_token_id, tokenizer.sep_token_id) == (7, 8)
    assert tokenizer.encode("a")[0] == 5
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], chat_template="{{ eos_token }}", tokenize=False
    )
    assert text == "<end_of_turn>"


def test_tokens_that_end_a_turn_end_a_text():
    assert load().stop_token_ids == [1, 106]
    assert load(eot_token_id=9, eom_token_id=10).stop_token_ids == [1, 9, 10, 106]
    fim = {"fim_pad_token_id": 11, "fim_rep_token_id": 12, "fim_sep_token_id": 13}
    assert load(**fim, fim_mid_token_id=14).stop_token_ids == [1, 11, 12, 13, 106]


def test_flags_say_what_is_added_to_a_text():
    a = load().token_to_id("a")
    assert load().encode("a") == [2, a]
    assert load(add_bos_token=False).encode("a") == [a]
    assert load(add_eos_token=True).encode("a") == [2, a, 1]
    assert load(add_space_prefix=False, add_sep_token=True, pre="default").encode("a") == [2, a]


def test_named_templates_are_read():
    metadata = gguf_metadata() | {
        "tokenizer.chat_template": "plain",
        "tokenizer.chat_template.tool_use": "with tools",
        "tokenizer.chat_templates": ["tool_use"],
    }
    backend = gguf_backend(metadata, "tiny.gguf")
    settings = gguf_settings(metadata, backend, "tiny.gguf")
    tokenizer = Tokenizer(backend, "tiny.gguf", settings=settings)
    chat = [{"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "plain"
    assert tokenizer.apply_chat_template(chat, tools=[{}], tokenize=False) == "with tools"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"add_space_prefix": True}, r"add_space_prefix is true, .*convert the model again"),
        ({"add_bos_token": 1}, "add_bos_token must be true or false, not 1"),
        ({"eos_token_id": "1"}, "eos_token_id must be an id, not '1'"),
        ({"eot_token_id": True}, "eot_token_id must be an id, not True"),
    ],
    ids=str,
)
def test_refused_key_names_file_and_value(keys, message):
    with pytest.raises(ValueError, match=rf"tiny\.gguf: tokenizer\.ggml\.{message}"):
        load(**keys)


def test_id_outside_the_vocabulary_is_ignored_with_a_warning():
    for bad in (475, -1, 1 << 40):
        with pytest.warns(UserWarning, match=rf"eos_token_id is {bad}, which is not in the vocab"):
            assert load(eos_token_id=bad).eos_token_id == 1


def test_missing_add_space_prefix_warns_of_the_difference_to_llama_cpp():
    metadata = gguf_metadata()
    del metadata["tokenizer.ggml.add_space_prefix"]
    backend = gguf_backend(metadata, "old.gguf")
    with pytest.warns(UserWarning, match=r"old\.gguf has no .*add_space_prefix.* none is added"):
        settings = gguf_settings(metadata, backend, "old.gguf")
    a = backend.token_to_id("a")
    assert Tokenizer(backend, "old.gguf", settings=settings).encode("a") == [2, a]


def test_unknown_key_warns():
    with pytest.warns(UserWarning, match=r"tokenizer\.ggml\.reverse is unknown"):
        load(reverse=True)


def test_every_key_of_the_package_gguf_is_known(recwarn):
    names = [v for k, v in vars(Keys.Tokenizer).items() if not k.startswith("_")]
    for name in names:
        key = name.removeprefix("tokenizer.")
        assert key in KNOWN or key == "chat_template.{name}", f"{key} is missing"
    load(**{n.removeprefix("tokenizer.ggml."): [] for n in names if n.endswith("_charsmap")})
    assert not recwarn
