"""Tests the command `gemma-fast chat` with a tiny random model."""

import json
from pathlib import Path

import pytest
import tiny_gemma4
import torch
from chat_checkpoint import write_chat_checkpoint
from click.testing import CliRunner

from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.cli import loading
from gemma_fast.cli.commands import main
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
    assert "use an instruction-tuned (-it) model with its chat template" in result.stderr
    assert "chat_template=" not in result.stderr


def test_a_tokenizer_without_a_bos_token_runs(path):
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bos_token": None}))
    options = ("--model", str(path), "--device", "cpu", "-n", "4")
    result = CliRunner().invoke(main, ["generate", "hello", *options])
    assert result.exit_code == 0, result.output


class Scripted:
    """Stands in for a model of Gemma 4. Gives the same answers in each chat."""

    ANSWERS = (
        "<|channel>thought\nhe is é\n<channel|>hello<turn|>",
        "<|channel>thought\nthe<channel|>the\nend<turn|>",
        "in<turn|>",
    )
    device = torch.device("cpu")
    end_token_ids = (1, 50, 106)

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.prompts = tokenizer, []

    def generate(self, ids, streamer, eos_token_id, **options):
        assert eos_token_id == [1, 50, 106]
        answer = self.tokenizer.encode(self.ANSWERS[len(self.prompts)], return_tensors="pt")
        self.prompts.append(ids[0].tolist())
        streamer.put(ids)
        for token in answer[0]:
            streamer.put(token[None])
        streamer.end()
        return torch.cat((ids, answer), dim=1)

    def memory(self) -> dict[str, int]:
        return {"weights": 0}


def scripted_chat(tmp_path, monkeypatch, *args: str):
    """Returns the result of a chat of three turns, and the model."""
    model = Scripted(Tokenizer.from_pretrained(tiny_gemma4.write_tokenizer(tmp_path)))
    monkeypatch.setattr(loading, "load", lambda *_: (model, model.tokenizer))
    return CliRunner().invoke(main, ["chat", *args], input="a\nb\nc\n"), model


@pytest.mark.parametrize(
    ("args", "variables"),
    [([], {}), (["--think"], {"enable_thinking": True}), (["--no-think"], {})],
    ids=str,
)
def test_thoughts_are_shown_apart_and_are_not_sent_again(tmp_path, monkeypatch, args, variables):
    result, model = scripted_chat(tmp_path, monkeypatch, *args)
    assert result.exit_code == 0, result.output
    assert result.stdout == "hello\nthe\nend\nin\n"
    assert "he is é\n" in result.stderr and "the\n" in result.stderr
    assert "thought\n" not in result.output and "<" not in result.output
    chat = []
    for prompt, user, answer in zip(model.prompts, "abc", ("hello", "the\nend", "in"), strict=True):
        chat.append({"role": "user", "content": user})
        wanted = model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, **variables)
        assert prompt == wanted.input_ids
        chat.append({"role": "assistant", "content": answer})


def test_thinking_needs_a_template_that_has_it(path):
    result = chat(path, "--think")
    assert result.exit_code == 2
    assert "has no variable enable_thinking" in result.stderr


@pytest.fixture
def gemma_4(tmp_path) -> Path:
    return write_chat_checkpoint(tmp_path, "gemma4")


@pytest.mark.parametrize("listed", [True, False])
def test_answers_of_gemma_4_end_at_its_tokens(gemma_4, listed):
    ends = [1, 106, 50] if listed else [1]
    set_generation_config(gemma_4, eos_token_id=ends, sequence_bias=[[[50], 1e3]])
    result = chat(gemma_4, "--greedy", text="hello\n")
    assert result.exit_code == 0, result.output
    assert "1 new tokens" in result.stderr and result.stdout == "\n"
    said = "Answers also end at <|tool_response> (50), <turn|> (106), which" in result.stderr
    assert said != listed


@pytest.mark.parametrize("prompt", ["hello", "<bos>hello"])
def test_prompt_of_gemma_4_has_bos_exactly_once(gemma_4, prompt):
    """The tokenizer adds none."""
    assert Tokenizer.from_pretrained(gemma_4).encode("hello")[0] != 2
    options = ("--model", str(gemma_4), "--device", "cpu")
    result = CliRunner().invoke(main, ["predict", prompt, "--json", *options])
    assert [row["token"] for row in json.loads(result.stdout)] == ["<bos>", "hello"]
    result = CliRunner().invoke(main, ["generate", prompt, "--json", "-n", "1", *options])
    assert json.loads(result.stdout)["prompt_tokens"] == 2
