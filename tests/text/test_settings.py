"""Checks that the files beside tokenizer.json have the same effect as in transformers."""

import inspect
import json
import re
import time

import pytest
import transformers
from tiny_tokenizer import TEXTS, tiny_backend, write_tokenizer
from tokenizers import normalizers, processors
from transformers import GemmaTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from gemma_fast import AutoTokenizer
from gemma_fast.text.keywords import SETTINGS
from gemma_fast.text.settings import APPLIED
from gemma_fast.text.tokenizer import Tokenizer

TOKEN = {"content": "<end_of_turn>", "lstrip": False, "normalized": False, "rstrip": False,
         "single_word": False, "special": True}  # fmt: skip
NEW = TOKEN | {"content": "<new>", "lstrip": True}
MASK = {"mask_token": "<unused0>"}  # without it, transformers adds <mask> to the vocabulary
CONFIGS = {
    "no file": {},
    "end of turn as end": {"eos_token": "<end_of_turn>"},
    "a token as an object": {"eos_token": {"__type": "AddedToken", **TOKEN}},
    "no pad token": {"pad_token": None},
    "a new token": {"eos_token": "<|im_end|>", "pad_token": "<|pad|>"},
    "a merged token": {"sep_token": "hello"},
    "named tokens": {"boi_token": "<start_of_image>", "image_token": "<unused9>"},
    "old extra tokens": {"additional_special_tokens": ["<start_of_turn>", "<unused7>"]},
    "both names": {"additional_special_tokens": ["<unused5>"], "extra_special_tokens": []},
    "extra tokens": {"extra_special_tokens": ["<unused8>", {"__type": "AddedToken", **NEW}]},
    "extra named tokens": {"extra_special_tokens": {"boi_token": "<start_of_image>"}},
    "length": {"model_max_length": 4},
    "old length": {"max_len": 4},
    "no length": {"model_max_length": 1000000000000000019884624838656},
    "sides": {"padding_side": "right", "truncation_side": "left", "model_max_length": 3},
    "names": {"model_input_names": ["input_ids", "token_type_ids"]},
    "flags": {"add_bos_token": False, "add_eos_token": True},
    "harmless": {
        "clean_up_tokenization_spaces": True, "legacy": False, "sp_model_kwargs": {"alpha": 0.1},
        "spaces_between_special_tokens": False, "use_default_system_prompt": True,
        "processor_class": "Gemma3Processor", "auto_map": {"AutoTokenizer": ["evil.Code", None]},
        "tokenizer_class": "GemmaTokenizer", "add_prefix_space": True, "stride": 3,
        "max_length": 3, "truncation_strategy": "only_first", "pad_token_type_id": 5,
        "init_inputs": [], "response_schema": {"a": 1}, "fast_tokenizer_files": ["tokenizer.json"],
    },
    "keywords of a call": {"use_fast": False, "from_slow": True, "device_map": "auto"},
    "control tokens": {"chat_control_tokens": ["<b>"]},
}  # fmt: skip
SAME = (
    "special_tokens_map", "all_special_ids", "extra_special_tokens", "model_max_length",
    "padding_side", "truncation_side", "model_input_names", "chat_template", "chat_control_tokens",
    "vocab", "vocab_size",
)  # fmt: skip


def write_config(path, **config) -> None:
    (path / "tokenizer_config.json").write_text(json.dumps(MASK | config))
    (path / "config.json").write_text('{"model_type": "gemma3"}')


def both(path, **options):
    return (
        Tokenizer.from_pretrained(path, **options),
        transformers.AutoTokenizer.from_pretrained(path, **options),
    )


def same(ours, judge) -> None:
    for name in SAME:
        assert getattr(ours, name) == getattr(judge, name), name
    assert str(ours.added_tokens_decoder) == str(judge.added_tokens_decoder)
    texts = [*TEXTS.values(), "a <new>b <|im_end|><start_of_image>"]
    for options in ({}, {"truncation": True}, {"padding": True})[: 3 if judge.pad_token else 2]:
        assert dict(ours(texts, **options)) == dict(judge(texts, **options))
    rows = judge(texts).input_ids
    for skip in (False, True):
        assert ours.decode(rows, skip) == judge.decode(rows, skip_special_tokens=skip)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_tokenizer_config_has_the_effect_it_has_in_transformers(tmp_path, config, recwarn):
    write_tokenizer(tmp_path)
    write_config(tmp_path, **config)
    same(*both(tmp_path))
    assert not [w for w in recwarn if "unknown" in str(w.message)]


def test_end_token_of_the_file_reaches_templates_and_stops(tmp_path):
    write_tokenizer(tmp_path)
    template = "{{ eos_token }}{{ boi_token }}{{ sep_token is defined }}"
    write_config(
        tmp_path, eos_token="<end_of_turn>", boi_token="<start_of_image>", chat_template=template
    )
    ours, judge = both(tmp_path)
    chat = [{"role": "user", "content": "a"}]
    assert ours.eos_token_id == judge.eos_token_id == 106
    text = ours.apply_chat_template(chat, tokenize=False)
    assert text == judge.apply_chat_template(chat, tokenize=False)
    assert text == "<end_of_turn><start_of_image>False"
    assert ours.stop_token_ids == [1, 106]
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<unused3>"}')
    assert Tokenizer.from_pretrained(tmp_path).stop_token_ids == [1, 7, 106]


@pytest.mark.parametrize("decoder", [False, True], ids=["old files", "with decoder"])
def test_old_files_have_the_effect_they_have_in_transformers(tmp_path, decoder):
    """transformers reads special_tokens_map.json and added_tokens.json only if the config has no
    added_tokens_decoder."""
    write_tokenizer(tmp_path)
    added = {str(i): TOKEN | {"content": f"<unused{i - 4}>"} for i in range(4, 105)}
    backend = tiny_backend().get_added_tokens_decoder()
    added |= {
        str(i): {**TOKEN, "content": t.content, "special": t.special} for i, t in backend.items()
    }
    config = {"added_tokens_decoder": added | {"475": NEW}} if decoder else {}
    write_config(tmp_path, **config)
    special = {
        "eos_token": TOKEN, "pad_token": "<eos>", "additional_special_tokens": ["<unused7>"],
    }  # fmt: skip
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    (tmp_path / "added_tokens.json").write_text('{"<new>": 475, "<newer>": 476}')
    ours, judge = both(tmp_path)
    same(ours, judge)
    assert ours.eos_token_id == (1 if decoder else 106)
    assert ("<newer>" in ours.vocab) == (not decoder)


def test_padding_and_truncation_in_tokenizer_json_set_the_sides(tmp_path):
    backend = Tokenizer(tiny_backend(), "tiny").backend
    backend.enable_padding(direction="right", pad_id=1, pad_token="<eos>")
    backend.enable_truncation(3, direction="left")
    backend.save(str(tmp_path / "tokenizer.json"))
    write_config(tmp_path)
    for name, pad in (("GemmaTokenizer", 0), ("PreTrainedTokenizerFast", 1)):
        write_config(tmp_path, tokenizer_class=name)
        ours = Tokenizer.from_pretrained(tmp_path)
        judge = getattr(transformers, name).from_pretrained(tmp_path)
        sides = (ours.padding_side, ours.truncation_side, ours.pad_token_id)
        assert sides == (judge.padding_side, judge.truncation_side, judge.pad_token_id)
        assert sides == ("right", "left", pad)


@pytest.mark.parametrize("kind", ["with eos", "none", "null"])
def test_post_processor_of_tokenizer_json_says_what_is_added(tmp_path, kind):
    backend = tiny_backend()
    names = [("<bos>", 2), ("<eos>", 1)]
    if kind == "with eos":
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=names
        )
    elif kind == "none":
        backend.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    else:
        backend.post_processor = processors.ByteLevel()  # replaced below
    backend.save(str(tmp_path / "tokenizer.json"))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    if kind == "null":
        content["post_processor"] = None
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    write_config(tmp_path)
    if kind == "null":
        with pytest.warns(UserWarning, match=r"no post_processor.*pass add_bos_token=True"):
            same(*both(tmp_path))
        assert Tokenizer.from_pretrained(tmp_path, add_bos_token=True).encode("a")[0] == 2
    else:
        same(*both(tmp_path))
        ours = Tokenizer.from_pretrained(tmp_path, add_eos_token=True)
        assert ours.encode("")[:-1] == ([2] if kind == "with eos" else [])
        assert ours.encode("")[-1] == 1


def test_keywords_of_from_pretrained_override_the_file(tmp_path):
    write_tokenizer(tmp_path)
    write_config(tmp_path, eos_token="<unused3>")
    options = {
        "eos_token": "<end_of_turn>", "pad_token": "<eos>", "padding_side": "right",
        "model_max_length": 5, "use_fast": True, "trust_remote_code": False, "revision": "main",
        "chat_template": "{{ eos_token }}", "extra_special_tokens": ["<unused4>"],
        "local_files_only": True, "legacy": False, "add_eos_token": True, "add_bos_token": True,
    }  # fmt: skip
    same(*both(tmp_path, **options))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eos_token": 3}, "eos_token is 3: it must be a token"),
        ({"eos_token": {"content": ""}}, "eos_token is .*must be a token"),
        ({"extra_special_tokens": "<a>"}, "extra_special_tokens is '<a>': it must be a list"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder is .* must be an object"),
        ({"added_tokens_decoder": {"x": "a"}}, "added_tokens_decoder is .*must be an object: id"),
        ({"model_max_length": -1}, "model_max_length is -1: it must be a positive"),
        ({"model_max_length": True}, "model_max_length is True"),
        ({"padding_side": "top"}, "padding_side is 'top': it must be one of"),
        ({"add_bos_token": "no"}, None),
        ({"use_fast": False, "post_processor": "x"}, "post_processor='x' is not supported: use"),
        ({"model_input_names": "input_ids"}, "must be a list of strings"),
        ({"tokenizer_class": "LlamaTokenizer"}, "'LlamaTokenizer'.*GemmaTokenizer.*AutoTokenizer"),
        ({"split_special_tokens": True}, "split_special_tokens=True is not .*AutoTokenizer"),
        ({"init_inputs": [1]}, "init_inputs=.* is not supported"),
        ({"fast_tokenizer_files": ["tokenizer.4.0.json"]}, "only tokenizer.json is read; rename"),
        ({"chat_template": [{"template": "a"}]}, "must have a name"),
        ({"chat_template": {"a": 3}}, "must be a string"),
    ],
    ids=str,
)
def test_refused_setting_names_file_key_and_value(tmp_path, config, message):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if message is None:  # transformers ignores it beside tokenizer.json
        Tokenizer.from_pretrained(tmp_path)
        return
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json.*{message}"):
        Tokenizer.from_pretrained(tmp_path)


def test_many_tokens_are_added_or_refused_soon(tmp_path):
    write_tokenizer(tmp_path)
    for count in (30_000, 200_000):
        tokens = [f"<{i}>" for i in range(count)]
        for value in (tokens, dict(zip(tokens, tokens, strict=True))):
            write_config(tmp_path, extra_special_tokens=value)
            start = time.monotonic()
            if count == 30_000:
                assert len(Tokenizer.from_pretrained(tmp_path)) == 475 + count
            else:
                with pytest.raises(ValueError, match="at most 32768 tokens, not 200000"):
                    Tokenizer.from_pretrained(tmp_path)
            assert time.monotonic() - start < 10
    write_config(tmp_path, **{f"a{i}_token": f"<{i}>" for i in range(200_000)})
    with pytest.raises(ValueError, match=r"tokenizer\.json: .* add 200111 tokens; .* 32768"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    for content in ('{"": 5}', '{"a": "b"}'):
        (tmp_path / "added_tokens.json").write_text(content)
        with pytest.raises(ValueError, match=r"added_tokens\.json must map at most"):
            Tokenizer.from_pretrained(tmp_path)


def test_unknown_key_warns_in_a_file_and_is_refused_in_a_call(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    with pytest.warns(UserWarning, match=r"tokenizer_config\.json: the key 'do_lower_case' is unk"):
        AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(TypeError, match="unexpected keyword argument 'do_lower_case'"):
        AutoTokenizer.from_pretrained(tmp_path, do_lower_case=True)


def test_another_normalizer_is_refused_where_transformers_applies_it(tmp_path):
    backend = tiny_backend()
    backend.normalizer = normalizers.Lowercase()
    backend.save(str(tmp_path / "tokenizer.json"))
    write_config(tmp_path)
    same(*both(tmp_path))  # GemmaTokenizer ignores the file's normalizer
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"tokenizer\.json: normalizer is .*'Lowercase'.*Gemma's"):
        Tokenizer.from_pretrained(tmp_path)


def keys_that_transformers_reads() -> set[str]:
    """Returns the keys of tokenizer_config.json and the keywords of from_pretrained that occur in
    transformers' code."""
    methods = [
        PreTrainedTokenizerBase.__init__, PreTrainedTokenizerBase.from_pretrained,
        PreTrainedTokenizerBase._from_pretrained, TokenizersBackend.__init__,
        TokenizersBackend.convert_to_native_format, GemmaTokenizer.__init__,
        transformers.AutoTokenizer.from_pretrained,
    ]  # fmt: skip
    found = {*PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES}
    for method in methods:
        found |= {
            name
            for name, parameter in inspect.signature(method).parameters.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        }
        source = inspect.getsource(method)
        found |= {*re.findall(r'kwargs(?:\.\w+\(|\[)\s*"(\w+)"', source)}
        found |= {*re.findall(r'"(\w+)" (?:not )?in (?:init_|local_)?kwargs', source)}
    return {name for name in found if not name.startswith("_")}


def test_every_key_that_transformers_reads_is_in_a_table():
    """A new key must be applied, or listed as one that has no effect or is refused."""
    arguments = {
        "self", "cls", "pretrained_model_name_or_path", "resolved_vocab_files",
        "init_configuration", "tokenizer_config_file",
    }  # fmt: skip
    files = {"added_tokens_file", "chat_template_file", "tokenizer_config_file"}
    missing = keys_that_transformers_reads() - {*APPLIED, *SETTINGS} - arguments - files
    assert not missing, missing
    assert not {*APPLIED} & {*SETTINGS}
