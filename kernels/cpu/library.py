"""Compiles the C kernels of this folder for this processor, and loads them.

They are compiled once, by gcc, as Triton compiles its launchers: the result is kept in a private
directory, under a name that depends on the sources, the compiler and the processor. Where that is
not possible, `library()` is None, and ops run their PyTorch references.

The kernels run on the threads of PyTorch's OpenMP runtime, so that two pools of threads do not
compete for the cores.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from gemma_fast.kernels.cpu.private_cache import private_directory

FOLDER = Path(__file__).parent
FLAGS = (
    "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared",
)  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL | None:
    """Returns the compiled kernels, or None if there is no compiler or no private directory."""
    compiler, directory = shutil.which(os.environ.get("CC", "gcc")), private_directory()
    if compiler is None or directory is None:
        return None
    try:
        path = directory / f"kernels-{_digest(compiler)}.so"
        if not path.exists():
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None


def _digest(compiler: str) -> str:
    """Returns a digest of all that the compiled kernels depend on."""
    version = subprocess.run([compiler, "-v"], capture_output=True, check=True).stderr
    parts = [version, repr(FLAGS).encode(), _processor()]
    parts += [path.read_bytes() for path in sorted(FOLDER.glob("*.[ch]"))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _processor() -> bytes:
    """Returns the model and the instruction sets of the first core."""
    try:
        cores = Path("/proc/cpuinfo").read_bytes().split(b"\n\n")
    except OSError:
        return os.uname().machine.encode()
    lines = cores[0].splitlines()
    return b"\n".join(x for x in lines if x.startswith((b"model", b"flags", b"Features", b"CPU")))


def _compile(compiler: str, path: Path) -> None:
    sources = [str(source) for source in sorted(FOLDER.glob("*.c"))]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        new = Path(folder) / path.name
        command = [compiler, *FLAGS, *sources, "-o", str(new), "-lm"]
        subprocess.run(command, capture_output=True, check=True)
        new.replace(path)  # another process may do the same
