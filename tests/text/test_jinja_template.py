"""Checks that a checkpoint's own chat template is used, and that a hostile one is stopped."""

import json
import time

import pytest
import transformers
from tiny_tokenizer import write_tokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template

from gemma_fast.text import jinja_template
from gemma_fast.text.jinja_child import environment
from gemma_fast.text.jinja_template import JinjaTemplate
from gemma_fast.text.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "hello"}]
HOSTILE = {
    "loops for hours": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "not end within 2 s",
    ),
    "fills memory": (
        "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x * 2 %}{% endfor %}",
        "512 MiB",
    ),
    "output without end": (
        "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
        "characters; the limit is",
    ),
    "one big string": ("{{ 'x' * 99999999999 }}", "512 MiB"),
    "long output": ("{{ 'x' * 9999999 }}", "9999999 characters"),
    "escapes by attributes": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "escapes by filter": ("{{ (''|attr('__class__')).__mro__ }}", "unsafe|undefined"),
    "escapes by format": ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe|__mro__"),
    "escapes by globals": ("{{ raise_exception.__globals__.json }}", "unsafe"),
    "escapes by namespace": ("{% set n = namespace() %}{% set n.__call__ = 1 %}", "__call__"),
    "changes messages": ("{{ messages.append(1) }}", "unsafe"),
    "recurses without end": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "nests deeply": ("(" * 9999 + "{{" + "(" * 9999, "failed"),
    "raises an exception": ("{{ raise_exception('no tools here') }}", "no tools here"),
    "has a syntax error": ("{% if %}", "Expected an expression"),
    "includes a file": ("{% include '/etc/passwd' %}", "loader"),
}


def render(template: str) -> str:
    variables = {"messages": MESSAGES, "tools": None, "bos_token": "<bos>"}
    return JinjaTemplate(template, "evil.jinja").render(variables).text


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_stopped(monkeypatch, name):
    template, message = HOSTILE[name]
    monkeypatch.setattr(jinja_template, "MAX_SECONDS", 2)
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"evil\.jinja.*({message})") as error:
        render(template)
    assert ("512 MiB" in str(error.value)) == (message == "512 MiB")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("ends", "reason"),
    [("sys.exit('one line\\nthe last one')", "the last one"), ("sys.exit(3)", "exit code 3")],
    ids=["message", "exit code"],
)
def test_renderer_that_exits_without_a_reply_raises(monkeypatch, tmp_path, ends, reason):
    (tmp_path / "child.py").write_text(f"import sys; {ends}")
    monkeypatch.setattr(jinja_template, "RENDERER", tmp_path / "child.py")
    with pytest.raises(ValueError, match=rf"evil\.jinja: the template failed: {reason}"):
        render("")


def test_template_can_use_the_functions_that_transformers_provides():
    assert render("{{ messages[0].content }} {{ bos_token }}{{ tools is none }}") == (
        "hello <bos>True"
    )
    assert render(
        "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    ) == ("01")
    assert render("{% set n = namespace(a=1) %}{% set n.a = n.a + 1 %}{{ n.a }}") == "2"
    assert render("{{ '<é>' | tojson }}{{ strftime_now('%Y') | length }}") == '"<é>"4'
    assert render("  {% if true %}\na\n  {% endif %}\n") == "a\n"


def test_environment_has_what_transformers_provides():
    ours, theirs = environment([0], []), _compile_jinja_template("").environment
    for name in ("globals", "filters", "tests"):
        assert getattr(ours, name).keys() == getattr(theirs, name).keys(), name
    assert sorted(tag for x in ours.extensions.values() for tag in x.tags) == sorted(
        tag for x in theirs.extensions.values() for tag in x.tags
    )
    for name in (
        "trim_blocks", "lstrip_blocks", "autoescape", "undefined", "finalize", "sandboxed",
        "block_start_string", "variable_start_string", "keep_trailing_newline", "newline_sequence",
    ):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize(
    "template",
    [
        "{{ dict.fromkeys('ab', 1) }}{{ dict({'a': 1}, b=2) }}{{ namespace(self=3).self }}",
        "{{ [1, {'é': '<'}] | tojson(indent=1, separators=(',', ':'), sort_keys=true) }}",
        "{{ {'é': 1} | tojson(ensure_ascii=true) }}{{ 1.0 | tojson }}",
        "{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}c",
        "{% set c = cycler(1, 2) %}{{ c.next() }}{{ c.next() }}{% set j = joiner() %}{{ j() }}",
        "{{ lipsum is defined }}{{ messages | map(attribute='content') | list }}",
        "{%- macro m(x) -%}{{ x }}{%- endmacro -%}{{ m(1) }}{{ x is undefined }}",
    ],
)
def test_template_renders_as_in_transformers(template):
    expected = _compile_jinja_template(template).render(messages=MESSAGES)
    assert render(template) == expected


@pytest.mark.filterwarnings("ignore:.*there is no chat template")
def test_template_is_found_where_transformers_finds_it(tmp_path):
    def rendered() -> str:
        return Tokenizer.from_pretrained(tmp_path).apply_chat_template(MESSAGES, tokenize=False)

    write_tokenizer(tmp_path)
    assert rendered().startswith("<bos><start_of_turn>user\n")
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": "<bos>"}))
    assert rendered().startswith("<bos><start_of_turn>user\n")
    config.write_text(json.dumps({"chat_template": "config"}))
    assert rendered() == "config"
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "named"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert rendered() == "named"
    (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }}")
    assert rendered() == "file <bos>"


def test_named_templates_are_chosen_as_in_transformers(tmp_path):
    write_tokenizer(tmp_path)
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t{{ 1 }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))

    def same() -> None:
        ours = Tokenizer.from_pretrained(tmp_path)
        judge = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert ours.chat_template == judge.chat_template
        for options in ({}, {"tools": [{}]}, {"chat_template": "tool_use"}, {"chat_template": "x"},
                        {"chat_template": "rag"}):  # fmt: skip
            options = {"tokenize": False, **options}
            try:
                expected = judge.apply_chat_template(MESSAGES, **options)
            except ValueError:
                with pytest.raises(ValueError, match=r"no default one: pass chat_template=… with"):
                    ours.apply_chat_template(MESSAGES, **options)
            else:
                assert ours.apply_chat_template(MESSAGES, **options) == expected

    same()
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_bytes(b"rag\r\n{{ 1 }}")
    same()
    (tmp_path / "chat_template.jinja").write_text("default")
    same()
    (tmp_path / "additional_chat_templates" / "rag.jinja").unlink()
    same()


@pytest.mark.parametrize("content", ['{"chat_template": 3}', "{", "[]"])
def test_malformed_tokenizer_config_is_refused(tmp_path, content):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        Tokenizer.from_pretrained(tmp_path)


def test_template_that_is_too_long_is_refused(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("x" * (jinja_template.MAX_LENGTH + 1))
    with pytest.raises(ValueError, match=r"chat_template\.jinja.*1048576"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("bos", ["", "<bos>", "{{ bos_token }}", "<bos><bos>"])
def test_bos_comes_from_the_template_as_in_transformers(tmp_path, recwarn, bos):
    """A template without <bos> gives no <bos>, and one warning."""
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(bos + "{{ messages[0].content }}")
    ours = Tokenizer.from_pretrained(tmp_path)
    judge = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for _ in range(2):
        assert ours.apply_chat_template(MESSAGES) == judge.apply_chat_template(MESSAGES)
    said = [w for w in recwarn if "writes no <bos>" in str(w.message)]
    assert len(said) == (not bos)


@pytest.mark.parametrize("bos", ["<unused3>", None])
def test_turns_without_a_template_write_the_bos_token_of_the_file(tmp_path, bos):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos}))
    with pytest.warns(UserWarning, match="no chat template"):
        text = Tokenizer.from_pretrained(tmp_path).apply_chat_template(MESSAGES, tokenize=False)
    assert text.startswith(f"{bos or ''}<start_of_turn>user")


def test_failed_template_is_named_by_the_place_that_it_came_from(tmp_path):
    write_tokenizer(tmp_path)
    bad = "{{ messages.nothing.nothing }}"
    named = [{"name": "default", "template": bad}, {"name": "rag", "template": bad}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    ours = Tokenizer.from_pretrained(tmp_path)
    for place, options in (
        (r"tokenizer_config\.json", {}),
        (r"tokenizer_config\.json", {"chat_template": "rag"}),
        ("^the chat_template that was passed", {"chat_template": bad}),
    ):
        with pytest.raises(ValueError, match=f"{place}: the template failed: UndefinedError") as e:
            ours.apply_chat_template(MESSAGES, **options)
        assert "limits" not in str(e.value)
    ours.chat_template = bad
    with pytest.raises(ValueError, match=r"^the attribute chat_template: the template failed"):
        ours.apply_chat_template(MESSAGES)
    ours = Tokenizer.from_pretrained(tmp_path, chat_template=bad)
    with pytest.raises(
        ValueError, match=r"^from_pretrained\(chat_template=…\): the template failed"
    ):
        ours.apply_chat_template(MESSAGES)
