"""Tests the command `gemma-fast chat` with a tiny random model."""

import json
from pathlib import Path

import pytest
from chat_checkpoint import write_chat_checkpoint
from click.testing import CliRunner

from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.cli import main
from gemma_fast.text.tokenizer import Tokenizer


@pytest.fixture
def path(tmp_path) -> Path:
    return write_chat_checkpoint(tmp_path)


def chat(path: Path, *args: str, text: str = "hello\nthe\n"):
    options = ("--model", str(path), "--device", "cpu", "-n", "4", *args)
    return CliRunner().invoke(main, ["chat", *options], input=text)


def set_generation_config(path: Path, **options) -> None:
    (path / "generation_config.json").write_text(json.dumps(options))


def test_model_with_a_template_chats_without_a_word(path):
    set_generation_config(path, eos_token_id=[1, 106])
    result = chat(path)
    assert result.exit_code == 0, result.output
    assert "Warning" not in result.stderr and "also end" not in result.stderr
    assert result.stderr.count("new tokens") == 2


def test_missing_template_is_said_once_before_the_first_answer(path):
    set_generation_config(path, eos_token_id=[1, 106])
    (path / "chat_template.jinja").unlink()
    result = chat(path)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("no chat template") == 1
    assert "use an instruction-tuned (-it) model" in result.stderr.partition("you>")[0]
    assert "chat_template=" not in result.stderr
    assert result.stdout.count("\n") >= 2


@pytest.mark.filterwarnings("default")
def test_warnings_have_no_place_in_the_code(path):
    set_generation_config(path, eos_token_id=[1, 106], thinking_budget=9)
    result = chat(path)
    warning = f"Warning: generation_config of {path}: thinking_budget=9 is unknown: remove it"
    assert warning in result.stderr and "UserWarning" not in result.stderr


def first_token(path: Path) -> int:
    tokenizer = Tokenizer.from_pretrained(path)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_tensors="pt"
    )
    model = GemmaForCausalLM.from_pretrained(path, device="cpu")
    ids = model.generate(**prompt, max_new_tokens=1, do_sample=False, eos_token_id=[])
    return int(ids[0, -1])


@pytest.mark.parametrize("where", ["generation_config", "tokenizer_config"])
def test_answer_ends_at_the_end_tokens_of_the_checkpoint(path, where):
    token = first_token(path)
    if where == "generation_config":
        set_generation_config(path, eos_token_id=[1, 106, token])
    else:
        set_generation_config(path, eos_token_id=[1])
        name = Tokenizer.from_pretrained(path).convert_ids_to_tokens(token)
        config = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": name}))
    result = chat(path, "--greedy", text="hello\n")
    assert result.exit_code == 0, result.output
    assert "1 new tokens" in result.stderr
    said = "Answers also end at" in result.stderr
    assert said == (where == "tokenizer_config")
    assert not said or (f"({token})" in result.stderr and "<end_of_turn> (106)" in result.stderr)


def test_system_message_reaches_the_template(path):
    result = chat(path, "--system", "the winner", text="hello\n")
    plain = chat(path, text="hello\n")
    counts = [int(x.stderr.split(" prompt tokens")[0].split()[-1]) for x in (plain, result)]
    assert counts[1] > counts[0]


def test_model_without_template_and_turns_is_refused(path):
    (path / "chat_template.jinja").unlink()
    file = path / "tokenizer.json"
    file.write_text(file.read_text().replace("_of_turn>", "_of_thought>"))
    result = chat(path)
    assert result.exit_code == 1
    assert "no chat template, and no <start_of_turn>" in result.stderr
    assert "chat_template=" not in result.stderr


def test_a_tokenizer_without_a_bos_token_runs(path):
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bos_token": None}))
    options = ("--model", str(path), "--device", "cpu", "-n", "4")
    result = CliRunner().invoke(main, ["generate", "hello", *options])
    assert result.exit_code == 0, result.output
