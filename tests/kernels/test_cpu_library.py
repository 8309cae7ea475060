"""Tests compiling and loading the C kernels: the cache, and machines where that is not possible."""

import os
import stat
import subprocess
import sys
from pathlib import Path
from shutil import copytree, which

import pytest
import torch
from c_kernels import needs_c
from cpu_tensors import DTYPES

from gemma_fast.kernels.cpu import calls, private_cache
from gemma_fast.kernels.cpu import library as library_file
from gemma_fast.kernels.geglu import geglu, geglu_reference
from gemma_fast.kernels.matvec import linear
from gemma_fast.kernels.rmsnorm import rms_norm, rms_norm_reference

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Returns an empty cache folder. Compiling takes less time, without optimization."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = ["-O0" if flag == "-O3" else flag for flag in library_file.FLAGS]
    monkeypatch.setattr(library_file, "FLAGS", tuple(flags))
    return tmp_path / "gemma_fast"


def library():
    """Returns the library, without the cache of this process."""
    return library_file.library.__wrapped__()


def script(folder: Path, text: str) -> str:
    """Writes an executable shell script, which stands in for the compiler."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return str(path)


def gcc() -> str | None:
    return which(os.environ.get("CC", "gcc"))


@needs_c
def test_the_compiler_runs_once(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", script(tmp_path, f'echo "$*" >> {tmp_path}/calls\nexec {gcc()} "$@"'))
    assert library() is not None and library() is not None
    assert (tmp_path / "calls").read_text().count("-o ") == 1
    (file,) = cache.iterdir()  # and no other file is left
    assert file.name.startswith("kernels-") and file.suffix == ".so"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


@needs_c
@pytest.mark.parametrize("change", ["source", "header", "flags", "compiler", "processor"])
def test_another_library_is_compiled_if_what_it_depends_on_changes(
    change, cache, tmp_path, monkeypatch
):
    folder = copytree(library_file.FOLDER, tmp_path / "sources")
    monkeypatch.setattr(library_file, "FOLDER", folder)
    assert library() is not None
    if change in ("source", "header"):
        file = folder / {"source": "matvec.c", "header": "simd.h"}[change]
        file.write_text(file.read_text() + "\n/* changed */\n")
    elif change == "flags":
        monkeypatch.setattr(library_file, "FLAGS", (*library_file.FLAGS, "-g"))
    elif change == "compiler":
        text = f'[ "$1" = -v ] && echo another version >&2\nexec {gcc()} "$@"'
        monkeypatch.setenv("CC", script(tmp_path, text))
    else:
        monkeypatch.setattr(library_file, "_processor", lambda: b"another one")
    assert library() is not None
    assert len(list(cache.glob("kernels-*.so"))) == 2


OFF = "the kernels for this CPU are off"
BROKEN = {
    "cannot be started": "exit 127",
    "fails": '[ "$1" = -v ] || { echo error >&2; exit 1; }',
    "writes no file": "exit 0",
    "writes no library": 'while [ $# -gt 1 ]; do [ "$1" = -o ] && echo text > "$2"; shift; done',
    "is killed": '[ "$1" = -v ] || kill -9 $$',
}


@pytest.mark.parametrize("what", BROKEN)
def test_without_a_working_compiler_there_is_no_library(what, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", script(tmp_path, BROKEN[what]))
    with pytest.warns(UserWarning, match=OFF):
        assert library() is None
    assert not [file for file in cache.iterdir() if file.is_dir()], "a temporary folder is left"


@pytest.mark.parametrize("name", ["CC", "PATH"])
def test_without_a_compiler_there_is_no_library(name, cache, monkeypatch):
    monkeypatch.setenv(name, "/nonexistent")
    with pytest.warns(UserWarning, match=r"kernels for this CPU are off, .* is not installed"):
        assert library() is None


def test_without_a_private_directory_there_is_no_library(cache, monkeypatch):
    cache.mkdir(mode=0o777)
    cache.chmod(0o777)
    with pytest.warns(UserWarning, match=r"are off, .* no cache folder that only this user"):
        assert private_cache.private_directory() is None and library() is None


@needs_c
@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_a_read_only_cache_can_be_read_but_not_written(cache, monkeypatch):
    assert library() is not None
    cache.chmod(0o500)
    assert library() is not None
    monkeypatch.setattr(library_file, "FLAGS", (*library_file.FLAGS, "-g"))
    with pytest.warns(UserWarning, match=OFF):
        assert library() is None


@needs_c
@pytest.mark.parametrize("kept", [0, 1, 100, 5_000, -5_000, -1])
def test_a_truncated_file_in_the_cache_is_compiled_again(kept, cache):
    """Loading it would end the process, because code is mapped from after the file's end."""
    assert library() is not None
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.unlink()  # its memory is mapped by this process
    file.write_bytes(whole[:kept])
    assert library() is not None
    assert library_file._is_whole(file)


@needs_c
def test_the_compiler_may_have_arguments(cache, monkeypatch):
    monkeypatch.setenv("CC", f"env LANG=C '{gcc()}'")
    assert library() is not None


PROGRAM = """
import torch
from gemma_fast.kernels.cpu import library as library_file
library_file.FLAGS = tuple("-O0" if flag == "-O3" else flag for flag in library_file.FLAGS)
from gemma_fast.kernels.rmsnorm import rms_norm, rms_norm_reference
x, weight = torch.randn(2, 3, 40), torch.randn(40)
torch.testing.assert_close(rms_norm(x, weight), rms_norm_reference(x, weight))
print("compiled" if library_file.library() else "no library")
"""


def start(**environment: str) -> subprocess.Popen:
    """Starts PROGRAM with these changes of the environment."""
    own = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    own |= {"PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.Popen(command, env=own, stdout=subprocess.PIPE, text=True)


# Compiles when another process does the same, or after 20 s.
TOGETHER = """[ "$1" = -v ] && exec {gcc} -v
touch {folder}/$$
for i in $(seq 200); do [ $(ls {folder} | wc -l) -gt 1 ] && exec {gcc} "$@"; sleep 0.1; done
exit 1"""


@needs_c
def test_processes_that_start_together_all_get_the_library(cache, tmp_path):
    waiting = tmp_path / "waiting"
    waiting.mkdir()
    compiler = script(tmp_path, TOGETHER.format(gcc=gcc(), folder=waiting))
    runs = [start(CC=compiler) for _ in range(2)]
    assert [run.communicate(timeout=120)[0] for run in runs] == ["compiled\n"] * 2
    assert len(list(waiting.iterdir())) == 2 and len(list(cache.iterdir())) == 1


def test_without_gcc_ops_run_their_references(cache):
    assert start(PATH="/nonexistent").communicate(timeout=120)[0] == "no library\n"


@needs_c
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_default_device_has_no_effect(dtype):
    """A caller may have set it to a GPU, and run a model on the CPU."""
    x, weight = torch.randn(2, 3, 40).to(dtype), torch.randn(40)
    with torch.device("meta"):
        norm, product, y = rms_norm(x, weight), linear(x, x[0]), geglu(x, x)
    assert torch.equal(norm, rms_norm(x, weight)) and torch.equal(product, linear(x, x[0]))
    assert y.is_cpu and calls.runs_c(x)
    close = torch.testing.assert_close
    close(norm, rms_norm_reference(x, weight)), close(y, geglu_reference(x, x))
