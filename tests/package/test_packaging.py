"""Tests the packages: in the clone and in the wheel, the modules of kernels/ and benchmarks/ are
imported only as gemma_fast.kernels.* and gemma_fast.benchmarks.*, and PyPI's package kernels is
not hidden."""

import os
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distributions
from pathlib import Path
from shutil import copy, copytree, ignore_patterns
from textwrap import dedent

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from gemma_fast.benchmarks.measure.outcome import OURS
from gemma_fast.kernels.cpu.library import library

ROOT = Path(__file__).resolve().parents[2]
FOR_THE_CLONE = ("test_kernels.py", "conftest.py")  # pytest files of benchmarks/: not packaged
ROOMS = [
    path.parent.relative_to(ROOT)
    for folder in ("gemma_fast", "benchmarks")
    for path in (ROOT / folder).rglob("__init__.py")
]
PACKAGES = {
    "gemma_fast/kernels",
    "gemma_fast/kernels/cpu",
    *(str(x) if x.parts[0] == "gemma_fast" else f"gemma_fast/{x}" for x in ROOMS),
}
SOURCES = {
    f"{folder}/{path.name}": path.read_bytes()
    for folder in PACKAGES
    for path in (ROOT / folder).iterdir()
    if path.suffix in (".py", ".c", ".h") and path.name not in FOR_THE_CLONE
}
for folder in ("benchmarks/verify/texts", "walkthrough/templates"):  # files that are no modules
    for path in (ROOT / "gemma_fast" / folder).iterdir():
        SOURCES[f"gemma_fast/{folder}/{path.name}"] = path.read_bytes()
PRINT_KERNEL_FILE = "import gemma_fast.kernels.rmsnorm as module; print(module.__file__)"
RUN_C = """
import torch
from gemma_fast.kernels.cpu.library import library
from gemma_fast.kernels.geglu import geglu
print(library().__class__.__name__, geglu(torch.ones(2), torch.ones(2)).sum().item())
"""


def python(*args, cwd: Path = ROOT) -> str:
    """Runs Python in the folder `cwd`, so that it imports from there first. Returns the output."""
    command = [sys.executable, *map(str, args)]
    ran = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout.strip()


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """Builds an sdist from a copy of the sources, and from it a wheel. Returns their folder."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for folder in ("gemma_fast", "kernels", "benchmarks"):
        copytree(ROOT / folder, tree / folder, symlinks=True, ignore=ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / name, tree)
    python("-m", "build", "--no-isolation", "--outdir", out, tree, cwd=out)
    return out


def test_kernels_and_benchmarks_are_symlinks_in_gemma_fast():
    for folder in ("kernels", "benchmarks"):
        assert os.readlink(ROOT / "gemma_fast" / folder) == f"../{folder}"
    assert not (ROOT / "kernels/__init__.py").exists()
    assert Path(python("-c", PRINT_KERNEL_FILE)).parent == ROOT / "gemma_fast/kernels"


def test_wheel_contains_the_sources_as_files(dist):
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        held = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == SOURCES


def test_sdist_contains_the_sources_as_files(dist):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as sdist:
        held = {member.name.partition("/")[2]: member for member in sdist.getmembers()}
        assert {name: sdist.extractfile(held[name]).read() for name in SOURCES} == SOURCES
    assert all(held[name].isreg() for name in SOURCES)
    assert not any(name.split("/")[0] in ("kernels", "benchmarks") for name in held)


@pytest.mark.slow
def test_wheel_can_be_installed(dist, tmp_path, monkeypatch):
    wheel = next(dist.glob("*.whl"))
    python("-m", "pip", "install", "--no-deps", "--no-index", "--target", tmp_path, wheel)
    file = Path(python("-c", PRINT_KERNEL_FILE, cwd=tmp_path))
    assert file.parent == tmp_path / "gemma_fast/kernels"
    assert OURS in python("-m", "gemma_fast.benchmarks", "--list", cwd=tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kind, result = python("-c", RUN_C, cwd=tmp_path).split()
    assert kind == ("CDLL" if library() else "NoneType")
    assert float(result) == pytest.approx(2 * 0.841192, abs=1e-5)


def test_benchmarks_run_from_the_clone_under_one_import_name():
    code = """
import runpy, sys
sys.argv[1:] = ["--list"]
try:
    runpy.run_module("benchmarks", run_name="__main__")
except SystemExit as done:
    assert not done.code
assert not [name for name in sys.modules if name.startswith("benchmarks.")]
"""
    assert OURS in python("-c", code)


@pytest.mark.slow
def test_transformers_finds_pypis_kernels_package_from_the_clone():
    classes = "GemmaForCausalLM, Gemma2ForCausalLM, Gemma3ForCausalLM"
    imports = f"import kernels; from transformers import {classes}"
    file = python("-c", f"{imports}; print(kernels.__file__)")
    assert file.endswith("__init__.py"), f"kernels is {file}, not the installed package"


def test_pins_of_the_demo_support_python_3_10():
    """Looks at all packages that the extra `demo` installs, and that are pinned for Python 3.10."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(x.partition("#")[0]) for x in lines if x.partition("#")[0].strip()]
    target = {"python_version": "3.10", "python_full_version": "3.10.0", "extra": ""}
    pinned = {canonicalize_name(x.name) for x in pins if not x.marker or x.marker.evaluate(target)}
    installed = {canonicalize_name(x.name): x for x in distributions()}
    if "gemma-fast" not in installed:
        pytest.skip("the clone is not installed")
    todo, seen = {"gemma-fast"}, set()
    while todo:
        name = todo.pop()
        seen.add(name)
        extra = {"extra": "demo"} if name == "gemma-fast" else {}
        for needs in map(Requirement, installed[name].requires or ()):
            if not needs.marker or needs.marker.evaluate(target | extra):
                todo |= {canonicalize_name(needs.name)} & installed.keys() - seen
    assert {"matplotlib", "torch", "gguf"} < seen
    for name in seen & pinned:
        assert "3.10" in SpecifierSet(installed[name].metadata["Requires-Python"] or ""), name


def test_import_does_not_load_slow_packages():
    code = "import sys, gemma_fast.causal_lm; print(*sys.modules)"
    assert not {"transformers", "torch._dynamo"} & set(python("-c", code).split())


def test_generate_runs_without_triton():
    """Triton does not exist for macOS and Windows."""
    code = """
        import sys

        sys.modules["triton"] = None
        import torch
        from tiny_models import CONFIGS, random_model

        random_model(CONFIGS["gemma3-mqa"]).generate(torch.tensor([[2, 5]]), max_new_tokens=2)
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests/support")])
    command = [sys.executable, "-c", dedent(code)]
    subprocess.run(command, env=environment, check=True, timeout=300)
