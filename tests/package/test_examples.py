"""Runs each program in docs/examples as a user would, and compares its output with known values.

Each test has the name of its example. The programs run on the CPU in float32, with the demo's
weights unpacked, so that their texts are reproducible. Only one_kernel.py also runs on a GPU.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chat_checkpoint import write_chat_checkpoint
from demo_answers import CONTINUATION, PROMPT, TOP_TEN

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs/examples"
# Outputs in float32 with the demo weights: a base model, which repeats the user's question.
ANSWER = "Hello mendatanguser\nHello mendatang"
SAMPLED = " a string to a different position. What I expected to see is the result is"
EXACT = "--quantize", "none"
LOG_LIKELIHOODS = {" to": -1.632, " to a new country": -5.148, " my car": -3.876}
PERPLEXITIES = {
    "The cat sat on the mat and slept.": 62.5, "The mat slept on the and cat sat.": 1657.3
}  # fmt: skip


@pytest.fixture
def run(request):
    """Returns a function that runs the example with the test's name, and returns its output."""
    name = request.function.__name__.removeprefix("test_")

    def run(*args: str, stdin: str = "", on_gpu: bool = False, interpret: bool = False) -> str:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
        environment |= {} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, EXAMPLES / f"{name}.py", *args]
        done = subprocess.run(command, env=environment, input=stdin, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_every_example_has_a_test():
    examples = {f"test_{path.stem}" for path in EXAMPLES.glob("*.py")}
    assert examples and examples <= globals().keys()


def test_stream_a_chat(run, demo_gguf, tmp_path):
    """The demo model repeats a question instead of answering it. The second prompt starts with the
    first turn, so both answers repeat the first question. Thoughts are not printed to stdout."""
    printed = run("--max-new-tokens", "6", *EXACT, stdin="Hello\nWho wrote Hamlet?\n")
    assert printed == f"> {ANSWER}\n> {ANSWER}\n> \n"
    write_chat_checkpoint(tmp_path, "gemma4")
    template = tmp_path / "chat_template.jinja"
    template.write_text(template.read_text() + "<|channel>thought\n{# it thinks #}")
    printed = run("--model", str(tmp_path), "--max-new-tokens", "6", stdin="hello\n")
    assert printed == "> \n> \n"


def test_batch_of_prompts(run, demo_gguf):
    """The shortest prompt is padded. Its greedy text must equal that of the prompt alone."""
    printed = run(*EXACT)
    greedy, sampled = re.findall(r"'I want to move' -> (.*)", printed)
    assert CONTINUATION.startswith(greedy.strip('"')) and len(greedy) > 50
    assert sampled == repr(SAMPLED)
    assert printed.count("'The capital of France is' -> ' the capital of the country of") == 1
    speeds = re.findall(r"^(?:greedy|sampled): (.*) new tokens/s", printed, re.M)
    assert len(speeds) == 2 and all(float(speed) > 0 for speed in speeds)


def test_many_prompts(run, demo_gguf):
    """The text that ends first is printed first, and the prompt that waited comes last but one."""
    printed = run(*EXACT)
    order = re.findall(r"^'(.*)' -> '.*' \((.*)\)$", printed.replace('"', "'"), re.M)
    assert [reason for _, reason in order] == ["length", "length", "stop", "length"]
    assert [prompt[:5] for prompt, _ in order] == ["The c", "Here ", "1, 2,", "I wan"]
    (text,) = re.findall(r"'I want to move' -> \"(.*)\"", printed)
    assert CONTINUATION.startswith(text) and len(text) > 40
    assert "'1, 2, 3, 4,' -> ' 5, 6, 7' (stop)" in printed
    assert len(re.findall(r"likeliest: '.*' .*, '.*' .*, '.*' ", printed)) == 4


def test_logits_and_scoring(run, demo_gguf):
    printed = run(*EXACT)
    found = {left: float(right) for left, right in re.findall(r"^(.*) = (.*)$", printed, re.M)}
    best = dict(list(TOP_TEN.items())[:5])
    expected = {f"P({token!r} | {PROMPT!r})": p for token, p in best.items()}
    expected |= {f"log P({text!r} | {PROMPT!r})": p for text, p in LOG_LIKELIHOODS.items()}
    expected |= {f"perplexity of {text!r}": p for text, p in PERPLEXITIES.items()}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-3)
    assert list(found)[:5] == list(expected)[:5]


@pytest.mark.parametrize("model", ["tiny", pytest.param("demo", marks=pytest.mark.slow)])
def test_accelerate_transformers(run, model, tmp_path, request):
    """The tiny model has random weights. transformers takes half a minute to load the demo."""
    if model == "demo":
        request.getfixturevalue("demo_gguf")
    printed = run(*(["--model", str(write_chat_checkpoint(tmp_path))] if model == "tiny" else []))
    before, after = re.findall(r"^(?:before|after): +\d+\.\d\d s  (.*)$", printed, re.M)
    assert before == after
    modules = {part: int(n) for n, part in re.findall(r"(\d+) × (\w+): reference", printed)}
    assert modules.keys() == {"norm", "mlp", "attention"} and "transformers" not in printed
    if model == "demo":
        assert after == repr(PROMPT + CONTINUATION)
        assert modules == {"norm": 109, "mlp": 18, "attention": 18}
    else:
        assert len(after) > 30


@pytest.mark.parametrize("interpret", [False, True], ids=["default", "interpreter"])
def test_one_kernel(run, interpret):
    on_gpu = torch.cuda.is_available() and not interpret
    printed = run(on_gpu=on_gpu, interpret=interpret)
    errors = dict(
        re.findall(r"(gemma_fast|PyTorch): largest relative error (\S+?)(?:,|$)", printed, re.M)
    )
    assert len(errors) == 2
    assert all(float(error) < (4e-3 if on_gpu else 5e-7) for error in errors.values()), printed
    assert ("its Triton kernel" in printed) == (on_gpu or interpret)
    assert ("there is no CUDA GPU" in printed) != (on_gpu or interpret)
    assert printed.count("GB/s") == (2 if on_gpu else 0)
