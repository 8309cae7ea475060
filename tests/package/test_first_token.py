"""Tests what `gemma-fast generate` does not do before its first token, because it takes time.

docs/checkpoints.md says how to measure that time.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# Modules that take at least 30 ms to import.
SLOW = {
    "sympy", "torch._dynamo", "torch._inductor", "rich", "jinja2", "huggingface_hub",
    "transformers", "matplotlib",
}  # fmt: skip


def run(code: str, **environment: str) -> list:
    """Runs the code in a new process, without TRITON_INTERPRET. Returns the JSON that it prints."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", dedent(code)], cwd=ROOT, env=inherited | environment,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def generate(demo_gguf) -> dict:
    """Returns the modules, calls and state of a process that has run `generate`."""
    return run(f"""
        import gc, json, sys
        from gemma_fast.cli import commands, loading
        from gemma_fast.causal_lm import GemmaForCausalLM
        from gemma_fast.checkpoint.gguf_reader import GGUFFile

        calls, loaded = [], []

        def count(cls, name):
            method = getattr(cls, name)
            def counted(*args, **options):
                calls.append(name)
                return method(*args, **options)
            setattr(cls, name, counted)

        def load(*args, load=loading.load):
            loaded.extend(load(*args))
            return loaded

        count(GGUFFile, "__init__")
        count(GemmaForCausalLM, "generate")
        loading.load = load
        command = ["generate", "I want to move", "-n", "2", "--device", "cpu"]
        commands.main([*command, "--model", {str(demo_gguf)!r}], standalone_mode=False)
        merges = loaded[1]._merges is not None
        frozen = gc.get_freeze_count() > 100_000 and gc.isenabled()
        print()
        print(json.dumps(dict(
            modules=[*sys.modules], calls=calls, merges=merges, frozen=frozen
        )))
    """)


def test_generate_imports_no_slow_module(generate):
    assert {"torch", "tokenizers"} <= set(generate["modules"])
    assert not SLOW & set(generate["modules"])


def test_generate_parses_the_file_once_and_needs_no_warm_up_on_a_cpu(generate):
    assert generate["calls"] == ["__init__", "generate"]


def test_a_short_prompt_does_not_find_all_merges(generate):
    assert generate["merges"]


def test_objects_of_the_model_are_not_collected(generate):
    assert generate["frozen"]


KERNEL = """
    {first}
    import json, sys
    from gemma_fast.kernels import matvec
    from gemma_fast.kernels._triton import triton
    print(json.dumps(["triton" in sys.modules, type(triton).__name__]))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU needs Triton")
def test_triton_is_imported_only_where_it_has_a_use():
    pytest.importorskip("triton")
    assert run(KERNEL.format(first="")) == [False, "_Absent"]
    assert run(KERNEL.format(first="import triton")) == [True, "module"]
    assert run(KERNEL.format(first=""), TRITON_INTERPRET="1") == [True, "module"]
