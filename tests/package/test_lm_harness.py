"""Tests that lm-evaluation-harness gives `gemma-fast` the same scores as its own model `hf`."""

import json
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
import torch
from chat_checkpoint import write_chat_checkpoint
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from marks import slow

from gemma_fast.lm_harness import GemmaFastLM

CHOICES = [
    ("hello", [" the world", " in", "the"]),
    ("the thinner ", ["a", "b", "c"]),
    ("in a world", [" ", "é漢", "<eos>"]),
    ("<bos>the winner", [" the", " world", " hello hello"]),
    ("a b c d e f", ["x", "xy", "xyz"]),
]
TEXTS = ["hello the world in the thinner", "<bos>a\n\nb", "é " * 200, "the " * 300]
PROMPTS = ["hello", "the thinner in the world", "<bos>a b", "in " * 150]
SHARED = """
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}, cache_dir: CACHE}
test_split: test
"""
TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "tiny_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "tiny_generate": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "a"
generation_kwargs: {until: ["h", "th"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
DOCS = {
    "tiny_choice": [{"text": text, "choices": choices} for text, choices in CHOICES],
    "tiny_rolling": [{"text": text} for text in TEXTS],
    "tiny_generate": [{"text": text} for text in PROMPTS],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_chat_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    for name, task in TASKS.items():
        file = path / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, DOCS[name])))
        shared = SHARED.replace("FILE", str(file)).replace("CACHE", str(path / "cache"))
        (path / f"{name}.yaml").write_text(f"task: {name}{shared}{task}")
    return path


@pytest.fixture(scope="module", params=[*slow("1"), "3"], ids=["batch 1", "batch 3"])
def both(request, checkpoint):
    """Returns the models `hf` and `gemma-fast`, created by name as the harness creates them."""
    args = f"pretrained={checkpoint},dtype=float32"
    options = {"batch_size": request.param, "device": "cpu"}
    return [
        lm_eval.api.registry.get_model(name).create_from_arg_string(args, options)
        for name in ("hf", "gemma-fast")
    ]


def evaluate(model, tasks: Path, **options) -> dict:
    """Returns, for each task, its metrics and the responses to its documents."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    out = lm_eval.simple_evaluate(
        model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, **options
    )
    responses = {
        task: [sample["resps"] for sample in sorted(samples, key=lambda x: x["doc_id"])]
        for task, samples in out["samples"].items()
    }
    return {task: (out["results"][task], responses[task]) for task in TASKS}


def same(actual, expected) -> None:
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        same(list(actual.values()), list(expected.values()))
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for pair in zip(actual, expected, strict=True):
            same(*pair)
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=1e-6, abs=1e-4)
    else:
        assert actual == expected


@pytest.mark.parametrize(
    "options",
    [{}, {"num_fewshot": 1}, {"apply_chat_template": True}],
    ids=["zero-shot", "one-shot", "chat"],
)
def test_scores_and_responses_equal_those_of_hf(both, tasks, options):
    expected, actual = (evaluate(model, tasks, **options) for model in both)
    same(actual, expected)
    assert any(len(answer[0][0]) > 1 for answer in expected["tiny_generate"][1])


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, arguments=x, idx=i) for i, x in enumerate(arguments)]


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 12},
        {"add_bos_token": False},
        {"prefix_token_id": 5},
    ],
    ids=str,
)
def test_windows_truncation_and_bos_are_those_of_hf(checkpoint, options):
    """Checks the windows of long texts, truncation on the left, <bos>, and the token that replaces
    an empty context."""
    args = {"pretrained": str(checkpoint), "dtype": "float32", "device": "cpu", "batch_size": 2}
    models = [
        lm_eval.api.registry.get_model(name)(**args, **options) for name in ("hf", "gemma-fast")
    ]
    pairs = [("", "the world"), ("hello ", "in"), ("a " * 30, "thinner a"), ("<bos>a", " the")]
    if "prefix_token_id" in options:  # with this option, `hf` does not detect <bos>
        pairs = pairs[:-1]
    kwargs = {"until": ["t"], "max_gen_toks": 5, "do_sample": False}
    for kind, arguments in (
        ("loglikelihood", pairs),
        ("loglikelihood_rolling", [(TEXTS[0],), (TEXTS[2],)]),
        ("generate_until", [(text, kwargs) for text in PROMPTS]),
    ):
        expected, actual = (getattr(m, kind)(requests(kind, *arguments)) for m in models)
        same(actual, expected)


def test_running_out_of_memory_halves_automatic_batches(checkpoint, monkeypatch):
    model = GemmaFastLM(str(checkpoint), dtype="float32", device="cpu", batch_size="auto")
    expected = model.loglikelihood(requests("loglikelihood", *[("a b", x) for x in ("cd", "ef")]))
    sizes, score = [], model._score

    def scarce(rows, kept):
        sizes.append(len(rows))
        if len(rows) > 1:
            raise torch.OutOfMemoryError
        return score(rows, kept)

    monkeypatch.setattr(model, "_score", scarce)
    actual = model.loglikelihood(requests("loglikelihood", *[("a b", x) for x in ("cd", "ef")]))
    same(actual, expected)
    assert sizes == [2, 1, 1]
    fixed = GemmaFastLM(model.model, tokenizer=model.tokenizer, batch_size=2)
    monkeypatch.setattr(fixed, "_score", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        fixed.loglikelihood(requests("loglikelihood", ("a b", "cd"), ("a b", "ef")))


@pytest.mark.slow
def test_command_line_scores_a_task(checkpoint, tasks):
    """`python -m gemma_fast.lm_harness` registers the model, then runs lm_eval's command."""
    command = [sys.executable, "-m", "gemma_fast.lm_harness", "--model", "gemma-fast"]
    command += ["--model_args", f"pretrained={checkpoint},dtype=float32", "--batch_size", "auto"]
    command += ["--include_path", str(tasks), "--tasks", "tiny_choice"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    assert "acc_norm" in out.stdout


def test_requests_that_cannot_be_scored_are_named_in_the_error(checkpoint):
    model = GemmaFastLM(str(checkpoint), dtype="float32", device="cpu", max_length=8)
    with pytest.raises(ValueError, match=r"\('a', 'bbb.* has 2 \+ 21 tokens .* 1 to 8 can be"):
        model.loglikelihood(requests("loglikelihood", ("a", "b" * 21)))
    model.add_bos_token = False
    with pytest.raises(ValueError, match=r"\(' ', 'b'\) has 0 \+ 2 tokens"):
        model.loglikelihood(requests("loglikelihood", (" ", "b")))
    with pytest.raises(ValueError, match="max_gen_toks=8 leaves no room for a prompt: it must be"):
        model.generate_until(requests("generate_until", ("a", {"until": [], "max_gen_toks": 8})))
    kwargs = {"until": [], "max_gen_toks": 2, "num_beams": 3}
    with pytest.raises(TypeError, match="num_beams=3 is not supported"):
        model.generate_until(requests("generate_until", ("a", kwargs)))
    with pytest.raises(ValueError, match="tokenizer=… is needed"):
        GemmaFastLM(model.model)
    with pytest.raises(TypeError, match="peft"):
        GemmaFastLM(str(checkpoint), peft="adapter")


def test_error_without_lm_eval_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.models", None)
    monkeypatch.delitem(sys.modules, "gemma_fast.lm_harness")
    with pytest.raises(ModuleNotFoundError, match="pip install lm_eval"):
        import gemma_fast.lm_harness  # noqa: F401
