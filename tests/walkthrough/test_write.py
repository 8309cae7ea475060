"""Tests how a walk-through is written: bad input, folders that exist, errors in the middle."""

import json
import os
import stat
import sys
from pathlib import Path

import click
import pytest
import torch
from chat_checkpoint import write_chat_checkpoint
from click.testing import CliRunner

from gemma_fast.cli.commands import main
from gemma_fast.presets import PRESETS
from gemma_fast.reference import Reference
from gemma_fast.walkthrough import theme
from gemma_fast.walkthrough import write as walkthrough
from gemma_fast.walkthrough.page import file_names
from gemma_fast.walkthrough.theme import Written
from gemma_fast.walkthrough.write import TEMPORARY, _new_folder, write_walkthrough

# Pictures that Gemma 3 lacks.
ABSENT = ("soft-caps", "shared-kv", "per-layer", "experts", "layer-scalar")
GEMMA3_FILES = file_names() - {f"{name}{end}.svg" for name in ABSENT for end in ("", "-dark")}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_chat_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def empty_pictures(monkeypatch):
    """Drawing takes seconds, so these tests write empty pictures."""

    def write_picture(name, draw, data, folder):
        for end in (".svg", "-dark.svg"):
            (folder / f"{name}{end}").write_text("<svg/>")
        return Written("nothing", 10, 10)

    monkeypatch.setattr(theme, "write_picture", write_picture)


def write(checkpoint: Path, out: Path, prompt: str = "hello", **options) -> Path:
    return write_walkthrough(prompt, checkpoint, str(out), device="cpu", **options)


def run(checkpoint: Path | str, out: Path, *args: str):
    where = ("--model", str(checkpoint), "--device", "cpu", "--out", str(out))
    return CliRunner().invoke(main, ["walkthrough", *(args or ("hello",)), *where])


def tree(folder: Path) -> dict[str, bytes | None]:
    """Returns the contents of all files under a folder, hidden ones too, and None for folders."""
    found = sorted(folder.rglob("*"))
    return {str(x.relative_to(folder)): x.read_bytes() if x.is_file() else None for x in found}


def earlier(folder: Path) -> Path:
    """Writes what is left of an earlier walk-through, with a picture that new ones do not have."""
    folder.mkdir()
    (folder / "soft-caps.svg").write_text("an old picture")
    (folder / "data.json").write_text("{}")
    return folder


def test_command_prints_the_path_of_the_page(checkpoint, tmp_path):
    result = run(checkpoint, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'out' / 'index.html'}\n"
    assert {x.name for x in (tmp_path / "out").iterdir()} == GEMMA3_FILES
    assert [x.name for x in tmp_path.iterdir()] == ["out"]


@pytest.mark.filterwarnings("default::UserWarning")
def test_words_of_the_command(checkpoint, tmp_path):
    result = run(checkpoint, tmp_path, "the", "--words", " hello,the, w x ,")
    assert (
        "Warning: words of several tokens are left out: hello (▁ hello), w x (▁w ▁ x)\n"
        in result.stderr
    )
    data = json.loads((tmp_path / "data.json").read_text(encoding="utf-8"))
    assert [*data["similarity"]["left_out"]] == ["hello", "w x"]
    assert data["similarity"]["names"] == ["▁the", "the"]


@pytest.mark.parametrize("status", [0, 1])
def test_open(checkpoint, tmp_path, monkeypatch, status):
    opened = []
    monkeypatch.setattr(click, "launch", lambda url: opened.append(url) or status)
    result = run(checkpoint, tmp_path, "the", "--open")
    assert opened == [(tmp_path / "index.html").as_uri()]
    assert ("no browser was found" in result.stderr) == bool(status)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("",), "the prompt is empty: pass a text"),
        (("hello " * 128,), "the prompt has 257 tokens; the model's context has 256"),
        (("a\ud800b",), r"must be a str of valid Unicode, not 'a\ud800b'"),
        (("a", "--dtype", "float16"), "overflows float16: use bfloat16 or float32"),
        (("a", "--dtype", "int8"), "'int8' is not one of"),
        (("a", "--words", "a,\ud800"), "must be a str of valid Unicode"),
        (("a", "--words", " , "), "Invalid value for --words: there is no word in it"),
    ],
    ids=["empty", "too long", "surrogate", "float16", "int8", "surrogate in words", "no word"],
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


def test_a_link_to_itself(checkpoint, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "out")
    assert run(checkpoint, tmp_path / "out").exit_code == 1


@pytest.mark.parametrize("name", ["file", "file/out", "file/a/out"])
def test_a_file_in_the_way(checkpoint, tmp_path, name):
    (tmp_path / "file").write_text("mine")
    result = run(checkpoint, tmp_path / name)
    assert result.exit_code == 1
    assert str(tmp_path / "file") in result.output and "choose" in result.output
    assert tree(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("name", ["mine.txt", ".hidden", "cost.svg/mine", "Cost.svg"])
def test_foreign_files_stay_untouched(checkpoint, tmp_path, name):
    folder = earlier(tmp_path / "out")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    before = tree(tmp_path)
    result = run(checkpoint, folder)
    assert result.exit_code == 1
    found = f"that are not of a walk-through, for example {name.split('/')[0]}"
    assert found in " ".join(result.output.split())
    assert tree(tmp_path) == before


def test_a_file_that_comes_during_the_work_stays(checkpoint, tmp_path):
    folder = earlier(tmp_path / "out")

    def save(name):
        (folder / "mine.txt").write_text("mine")

    with pytest.raises(ValueError, match=r"for example mine\.txt"):
        write(checkpoint, folder, progress=save)
    assert set(tree(folder)) == {"mine.txt", "data.json", "soft-caps.svg"}


def test_earlier_walkthrough_is_replaced(checkpoint, tmp_path):
    write(checkpoint, earlier(tmp_path / "out"))
    write(checkpoint, tmp_path / "out", "hello the")
    data = json.loads((tmp_path / "out" / "data.json").read_text(encoding="utf-8"))
    assert data["prompt"] == "hello the"
    assert [x.name for x in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "cost.svg").is_file()
    assert not (tmp_path / "out" / "soft-caps.svg").exists()


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

    def write_picture(name, draw, data, folder):
        (folder / "half.svg").write_text("half")
        raise error

    monkeypatch.setattr(theme, "write_picture", write_picture)
    files = tree(tmp_path)
    with pytest.raises(error):
        write(checkpoint, tmp_path / "out")
    assert tree(tmp_path) == files


def test_a_folder_that_is_a_file_system_of_its_own(checkpoint, tmp_path, monkeypatch):
    """Nothing is renamed across the border of the folder."""
    out, rename = earlier(tmp_path / "out"), Path.rename

    def checked(self, target):
        assert self.is_relative_to(out) and Path(target).is_relative_to(out)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", checked)
    write(checkpoint, out)
    assert {x.name for x in out.iterdir()} == GEMMA3_FILES


def test_a_temporary_folder_of_another_run_stays(checkpoint, tmp_path):
    out = earlier(tmp_path / "out")
    (out / f"{TEMPORARY}abc").mkdir()
    write(checkpoint, out)
    assert (out / f"{TEMPORARY}abc").is_dir() and (out / "index.html").is_file()


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
    assert Path("index.html").is_file() and not Path("soft-caps.svg").exists()


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


def test_a_model_in_the_current_folder_has_a_name(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(checkpoint)
    write(Path(), tmp_path / "out")
    data = json.loads((tmp_path / "out" / "data.json").read_text(encoding="utf-8"))
    assert data["model"]["name"] == checkpoint.name


def test_progress_names_each_part(checkpoint, tmp_path):
    seen = []
    write(checkpoint, tmp_path / "out", progress=seen.append)
    drawn = (len(GEMMA3_FILES) - 3) // 2
    assert seen == [
        f"Reading {checkpoint.name}", "Running the model", "Running it without norms",
        "Measuring time", *(f"Drawing {i + 1} of {drawn}" for i in range(drawn)),
    ]  # fmt: skip


def test_name_of_a_missing_model_is_no_markup(tmp_path):
    result = run(tmp_path / "[red]x[/x]", tmp_path / "out")
    assert result.exit_code == 1 and "[red]x[/x] does not exist" in result.output


def test_logits_that_are_not_finite_are_refused(checkpoint, tmp_path, monkeypatch):
    load = walkthrough._load

    def broken(*args):
        reference, *rest = load(*args)
        reference.weights["model.norm.weight"][0] = float("nan")
        return reference, *rest

    monkeypatch.setattr(walkthrough, "_load", broken)
    with pytest.raises(ValueError, match=r"the logits are not finite in torch\.float32"):
        write(checkpoint, tmp_path / "out")
    assert tree(tmp_path) == {}


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


def test_prompts_of_gemma_4_have_bos_exactly_once(tmp_path):
    """The tokenizer of an instruction-tuned Gemma 4 adds none."""
    model = write_chat_checkpoint(tmp_path, "gemma4")
    _, tokenizer, _ = walkthrough._load(model, "auto", "cpu", None, progress=lambda _: None)
    assert tokenizer.encode("hello") == [2, tokenizer.token_to_id("hello")]
