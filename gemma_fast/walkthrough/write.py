"""Writes a walk-through: loads the model, collects data, draws, and moves the files in place."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from gemma_fast import __version__
from gemma_fast.checkpoint.open import open_checkpoint
from gemma_fast.checkpoint.rounded import with_quantize
from gemma_fast.load import pick_device, pick_dtype, refuse_overflow
from gemma_fast.memory import out_of_memory
from gemma_fast.reference import Reference
from gemma_fast.text.tokenizer import Tokenizer
from gemma_fast.walkthrough.data import WORDS, collect, encode

Progress = Callable[[str], None]
TEMPORARY = ".walkthrough-"  # prefix of temporary folders


def write_walkthrough(
    prompt: str,
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    words: Sequence[str] | None = None,
    dtype: str = "auto",
    device: str | None = None,
    quantize: str | None = None,
    progress: Progress = lambda _: None,
) -> Path:
    """Writes the page, its pictures and data.json to the folder `out`. Returns the page's path.

    model     directory, .gguf file or hub id
    out       a folder that does not exist, is empty, or holds an earlier walk-through
    words     words whose embeddings are compared; None: data.WORDS. Warns of those that are
              several tokens
    quantize  "int8" or "int4": the weights have the values that from_pretrained packs with this
              option; they are unpacked here
    progress  is called with the name of each part of the work before it begins

    The files are written to a temporary folder, and moved to `out` when all are complete. Raises
    ValueError for an empty prompt, one that is longer than the context, and a folder with other
    files; OSError for a folder that cannot be written; ImportError without the extra.
    """
    _require_extra()
    out = Path(out)
    if not prompt:
        raise ValueError("the prompt is empty: pass a text, for example 'I want to move'")
    with _new_folder(out) as folder:
        data: dict[str, Any] = {
            "prompt": prompt,
            "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
            "versions": {"gemma_fast": __version__, "torch": torch.__version__},
        }
        reference, tokenizer, name = _load(model, dtype, device, quantize, progress)
        ids = encode(tokenizer, prompt, reference.config)
        where = reference.weights["model.norm.weight"].device
        with out_of_memory(f"a pass of {ids.shape[1]} tokens", 0, where, "a shorter prompt"):
            data |= collect(reference, tokenizer, ids, words or WORDS, progress)
        data["model"]["name"] = name
        if words and (left_out := data["similarity"]["left_out"]):
            split = ", ".join(f"{word} ({' '.join(found)})" for word, found in left_out.items())
            warnings.warn(f"words of several tokens are left out: {split}", stacklevel=2)
        _write(data, folder, progress)
    return out / "index.html"


def _require_extra() -> None:
    try:
        import matplotlib  # noqa: F401
        import pygments  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'a walk-through needs {error.name}: pip install "gemma_fast[walkthrough]"',
            name=error.name,
        ) from error


def _load(
    model: str | os.PathLike[str], dtype: str, device: str | None, quantize: str | None,
    progress: Progress,
) -> tuple[Reference, Tokenizer, str]:  # fmt: skip
    path = Path(model)
    name = path.absolute().name if path.exists() else str(model)
    progress(f"Reading {name}")
    tokenizer = Tokenizer.from_pretrained(model)
    tokenizer.require_bos()
    where = pick_device(device, None)
    checkpoint = with_quantize(open_checkpoint(model), quantize, where)
    kind = pick_dtype(dtype, checkpoint, where)
    refuse_overflow(checkpoint.config, kind)
    size = checkpoint.config.num_parameters * kind.itemsize
    with out_of_memory(name, size, where, "--dtype bfloat16 or a smaller model"):
        return Reference.from_checkpoint(checkpoint, dtype=kind, device=where), tokenizer, name


def _write(data: dict[str, Any], folder: Path, progress: Progress) -> None:
    from gemma_fast.walkthrough.page import PICTURES, applicable, write_pages
    from gemma_fast.walkthrough.theme import write_picture

    pictures = {}
    names = applicable(data)
    for i, name in enumerate(names):
        progress(f"Drawing {i + 1} of {len(names)}")
        pictures[name] = write_picture(name, PICTURES[name], data, folder)
    write_pages(data, pictures, folder)
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    (folder / "data.json").write_text(text, encoding="utf-8")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yields an empty folder whose files replace those of `out` at the end. After an error nothing
    is left, and `out` is as it was."""
    try:
        out = out.resolve()
    except RuntimeError as error:  # Python before 3.13
        raise ValueError(f"{out} is a link that leads to itself: choose another --out") from error
    _check_replaceable(out)
    place = next(folder for folder in (out, *out.parents) if folder.exists())
    try:  # in the folder itself if it exists, because that may be a file system of its own
        holder = tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=place)
    except OSError as error:
        raise OSError(f"cannot write to {place}: {error.strerror}; choose --out") from error
    with holder as temporary:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        new.mkdir()
        yield new
        _check_replaceable(out)
        if out.exists():  # the folder itself stays, because it may be the current folder
            old.mkdir()
            with _moved(out, old), _moved(new, out):
                pass
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            new.rename(out)


@contextmanager
def _moved(source: Path, target: Path) -> Iterator[None]:
    """Moves the files of a folder to an empty one. After an error they are moved back."""
    try:
        for path in files_of(source):
            path.rename(target / path.name)
        yield
    except BaseException:
        for path in files_of(target):
            path.rename(source / path.name)
        raise


def files_of(folder: Path) -> list[Path]:
    """Returns the contents of the folder, except for the temporary folders of running commands."""
    return [path for path in folder.iterdir() if not path.name.startswith(TEMPORARY)]


def _check_replaceable(out: Path) -> None:
    """Raises ValueError if `out` holds anything that is not part of an earlier walk-through."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file: choose a folder with --out")
    from gemma_fast.walkthrough.page import file_names

    ours = file_names()
    others = [x.name for x in files_of(out) if x.name not in ours or not x.is_file()]
    if others:
        raise ValueError(
            f"{out} has files that are not of a walk-through, for example {min(others)}: choose"
            " another folder with --out"
        )
