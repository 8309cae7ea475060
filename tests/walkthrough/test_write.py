"""Tests how a walk-through is written: bad input, folders that exist, errors in the middle."""

import json
import os
import stat
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from chat_checkpoint import write_chat_checkpoint
from click.testing import CliRunner

from gemma_fast.cli import main
from gemma_fast.config import PRESETS
from gemma_fast.reference import Reference
from gemma_fast.walkthrough import page
from gemma_fast.walkthrough import write as walkthrough
from gemma_fast.walkthrough.write import _new_folder, write_walkthrough


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_chat_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def draw_one_picture(monkeypatch):
    """Draws only the picture that the page cannot do without. Drawing all of them takes seconds."""
    monkeypatch.setattr(page, "PICTURES", {"attention-maps": page.PICTURES["attention-maps"]})


def write(checkpoint: Path, out: Path, prompt: str = "hello", **options) -> Path:
    return write_walkthrough(prompt, checkpoint, out, device="cpu", **options)


def run(checkpoint: Path | str, out: Path, *args: str):
    where = ("--model", str(checkpoint), "--device", "cpu", "--out", str(out))
    return CliRunner().invoke(main, ["walkthrough", *(args or ("hello",)), *where])


def tree(folder: Path) -> dict[str, bytes | None]:
    """Returns the contents of all files under a folder, hidden ones too, and None for folders."""
    found = sorted(folder.rglob("*"))
    return {str(x.relative_to(folder)): x.read_bytes() if x.is_file() else None for x in found}


def earlier(folder: Path) -> Path:
    """Writes what is left of an earlier walk-through, with a file that new ones do not have."""
    folder.mkdir()
    (folder / "old.svg").write_text("an old picture")
    (folder / "data.json").write_text(json.dumps({"files": ["data.json", "old.svg"]}))
    return folder


def test_command_prints_the_path_of_the_page(checkpoint, tmp_path):
    result = run(checkpoint, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'out' / 'index.html'}\n"
    assert set(tree(tmp_path)) == {
        "out", "out/index.html", "out/reference.html", "out/data.json", "out/attention-maps.svg",
        "out/attention-maps-dark.svg",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("",), "the prompt is empty: pass a text"),
        (("hello " * 128,), "the prompt has 257 tokens; the model's context has 256"),
        (("a\ud800b",), r"must be a str of valid Unicode, not 'a\ud800b'"),
        (("a", "--dtype", "float16"), "overflows float16: use bfloat16 or float32"),
        (("a", "--dtype", "int8"), "'int8' is not one of"),
        (("a", "--words", "a,\ud800"), "must be a str of valid Unicode"),
    ],
    ids=["empty", "too long", "surrogate", "float16", "int8", "surrogate in words"],
)
def test_bad_input_prints_a_message_and_writes_nothing(checkpoint, tmp_path, args, message):
    result = run(checkpoint, tmp_path / "a" / "b", *args)
    assert result.exit_code != 0
    assert message in result.output
    assert "Traceback" not in result.output
    assert tree(tmp_path) == {}


def test_longest_prompt_fits(checkpoint, tmp_path):
    """255 tokens and <bos>."""
    assert run(checkpoint, tmp_path / "out", "hello" + " hello" * 127).exit_code == 0


def test_missing_model(tmp_path):
    result = run("/nowhere/model", tmp_path / "out")
    assert result.exit_code == 1
    assert "/nowhere/model does not exist" in result.output
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("package", ["matplotlib", "pygments"])
def test_missing_extra_is_named(checkpoint, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    result = run(checkpoint, tmp_path / "out")
    assert result.exit_code == 1
    command = 'pip install "gemma_fast[walkthrough]"'
    assert f"a walk-through needs {package}: {command}" in result.output
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("name", ["file", "file/out", "file/a/out"])
def test_a_file_in_the_way(checkpoint, tmp_path, name):
    (tmp_path / "file").write_text("mine")
    result = run(checkpoint, tmp_path / name)
    assert result.exit_code == 1
    assert str(tmp_path / "file") in result.output and "choose" in result.output
    assert tree(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize(
    "data",
    [None, b"{}", b"[1]", b"\xff", b"not JSON", b'{"files": 3}', b'{"files": [[]]}',
     b'{"files": ["data.json", "other.svg"]}'],
    ids=str,
)  # fmt: skip
def test_foreign_files_stay_untouched(checkpoint, tmp_path, data):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    if data is not None:
        (folder / "data.json").write_bytes(data)
    before = tree(tmp_path)
    result = run(checkpoint, folder)
    assert result.exit_code == 1
    assert "has files that are not of a walk-through, for example" in result.output
    assert tree(tmp_path) == before


def test_earlier_walkthrough_is_replaced(checkpoint, tmp_path):
    write(checkpoint, earlier(tmp_path / "out"))
    write(checkpoint, tmp_path / "out", "hello the")
    data = json.loads((tmp_path / "out" / "data.json").read_text(encoding="utf-8"))
    assert data["prompt"] == "hello the"
    assert [x.name for x in tmp_path.iterdir()] == ["out"]
    assert sorted(x.name for x in (tmp_path / "out").iterdir()) == data["files"]
    assert "old.svg" not in data["files"]


def test_folder_that_is_empty_or_new(checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "a/b/c"):
        assert write(checkpoint, tmp_path / name) == tmp_path / name / "index.html"
        assert (tmp_path / name / "data.json").is_file()
    assert {x.name for x in tmp_path.iterdir()} == {"empty", "a"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("before", ["nothing", "earlier", "empty"])
def test_error_in_the_middle_changes_nothing(checkpoint, tmp_path, monkeypatch, error, before):
    if before == "earlier":
        earlier(tmp_path / "out")
    if before == "empty":
        (tmp_path / "out").mkdir()

    def draw(name, data, folder):
        (folder / "half.svg").write_text("half")
        raise error

    monkeypatch.setattr(page, "draw", draw)
    files = tree(tmp_path)
    with pytest.raises(error):
        write(checkpoint, tmp_path / "out")
    assert tree(tmp_path) == files


@pytest.mark.parametrize("move", range(1, 5))
def test_interrupt_while_files_are_moved_restores_the_earlier_ones(tmp_path, monkeypatch, move):
    """Interrupts one of the four moves: of two earlier files, and of two new ones."""
    files, rename, moves = tree(earlier(tmp_path / "out")), Path.rename, []

    def interrupted(self, target):
        moves.append(target)
        if len(moves) == move:
            raise KeyboardInterrupt
        return rename(self, target)

    def write_two_files():
        with _new_folder(tmp_path / "out") as folder:
            (folder / "data.json").write_text("{}")
            (folder / "index.html").write_text("new")

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_two_files()
    assert tree(tmp_path / "out") == files
    assert [x.name for x in tmp_path.iterdir()] == ["out"]


def test_the_current_folder_stays_the_current_folder(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(earlier(tmp_path / "out"))
    assert write(checkpoint, Path()) == Path("index.html")
    assert Path.cwd() == tmp_path / "out"
    assert Path("index.html").is_file() and not Path("old.svg").exists()


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_and_its_folder_is_filled(checkpoint, tmp_path, exists):
    if exists:
        (tmp_path / "target").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "target")
    write(checkpoint, tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "target" / "index.html").is_file()
    assert {x.name for x in tmp_path.iterdir()} == {"out", "target"}


def test_permissions_follow_the_umask(checkpoint, tmp_path):
    umask = os.umask(0o027)
    try:
        write(checkpoint, tmp_path / "out")
    finally:
        os.umask(umask)
    modes = {stat.S_IMODE(x.stat().st_mode) for x in (tmp_path / "out").iterdir()}
    assert modes == {0o640}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


def test_the_backend_of_matplotlib_stays(checkpoint, tmp_path, monkeypatch):
    """A notebook shows its own pictures after it has written a walk-through."""
    monkeypatch.setitem(matplotlib.rcParams, "backend", "agg")
    write(checkpoint, tmp_path / "out")
    assert matplotlib.rcParams["backend"] == "agg"


def test_a_model_in_the_current_folder_has_a_name(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(checkpoint)
    write(Path(), tmp_path / "out")
    data = json.loads((tmp_path / "out" / "data.json").read_text(encoding="utf-8"))
    assert data["model"]["name"] == checkpoint.name


def test_progress_names_each_part(checkpoint, tmp_path):
    seen = []
    write(checkpoint, tmp_path / "out", progress=seen.append)
    assert seen == [
        f"Reading {checkpoint.name}", "Running the model", "Running it without norms",
        "Measuring time", "Drawing 1 of 1",
    ]  # fmt: skip


def test_memory_error_names_the_device_of_the_model(tmp_path, monkeypatch):
    """The ids are made on the CPU, also for a model on a GPU."""

    def collect(*_):
        raise RuntimeError("CUDA out of memory")

    reference = Reference(PRESETS["gemma-2b"], {"model.norm.weight": torch.empty(1, device="meta")})
    monkeypatch.setattr(walkthrough, "collect", collect)
    monkeypatch.setattr(walkthrough, "encode", lambda *_: torch.ones(1, 7, dtype=torch.long))
    monkeypatch.setattr(walkthrough, "_load", lambda *_: (reference, None, "model"))
    with pytest.raises(torch.OutOfMemoryError, match="a pass of 7 tokens on meta; try a shorter"):
        write_walkthrough("hello", "model", tmp_path / "out")
    assert tree(tmp_path) == {}
