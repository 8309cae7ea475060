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
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

from gemma_fast.kernels.cpu.private_cache import private_directory

FOLDER = Path(__file__).parent
FLAGS = (
    "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared",
)  # fmt: skip
DIGEST = hashlib.sha256().digest_size


@functools.cache
def library() -> ctypes.CDLL | None:
    """Returns the compiled kernels. Returns None, and warns of the reason, if there is no compiler
    or no private directory."""
    compiler, directory = _compiler(), private_directory()
    try:
        if not compiler:
            raise OSError(f"{os.environ.get('CC') or 'gcc'} is not installed")
        if directory is None:
            raise OSError("there is no cache folder that only this user can write")
        path = directory / f"kernels-{_digest(compiler)}.so"
        if not _is_whole(path):
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or b""
        lines = output.decode(errors="replace").splitlines()[:3]
        warnings.warn(
            "the kernels for this CPU are off, so PyTorch's slower ops run; see docs/kernels.md,"
            f" On a CPU: {' '.join([str(error), *lines])}",
            stacklevel=2,
        )
        return None


def _compiler() -> list[str]:
    """Returns the command $CC, which may have arguments ("ccache gcc"), by default gcc. Returns []
    if it is not installed."""
    command = shlex.split(os.environ.get("CC", "")) or ["gcc"]
    return command if shutil.which(command[0]) else []


def _digest(compiler: list[str]) -> str:
    """Returns a digest of all that the compiled kernels depend on."""
    version = subprocess.run([*compiler, "-v"], capture_output=True, check=True).stderr
    parts = [version, repr((compiler, FLAGS)).encode(), _processor()]
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


def _is_whole(path: Path) -> bool:
    """Whether the file is as _compile wrote it: loading a truncated library ends the process."""
    content = path.read_bytes() if path.exists() else b""
    return content[-DIGEST:] == hashlib.sha256(content[:-DIGEST]).digest()


def _compile(compiler: list[str], path: Path) -> None:
    """Writes the library, and a digest of it after its end, where the loader does not read."""
    sources = [str(source) for source in sorted(FOLDER.glob("*.c"))]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        new = Path(folder) / path.name
        command = [*compiler, *FLAGS, *sources, "-o", str(new), "-lm"]
        subprocess.run(command, capture_output=True, check=True)
        digest = hashlib.sha256(new.read_bytes()).digest()
        with new.open("ab") as file:
            file.write(digest)
        new.replace(path)  # another process may do the same
