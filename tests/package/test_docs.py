"""Tests README.md, CONTRIBUTING.md and docs/: their code must run, the targets of their links must
exist, and their numbers must equal the benchmark results. test_notebook.py runs the notebook.

The Python blocks of a page run in order, in one process. Each command of a shell block runs in its
own process. A comment directly before a block changes this, and must give the reason:

    <!-- not run: needs a GPU -->
    <!-- slow: loads the demo weights -->     only `make test-all` runs it

`make` commands are not run, but their targets must exist.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from gates import GATES

ROOT = Path(__file__).resolve().parents[2]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
PAGES = [x for x in (README, CONTRIBUTING) if x.exists()] + sorted((ROOT / "docs").rglob("*.md"))
NOTEBOOK = ROOT / "docs/walkthrough.ipynb"
MARKER = re.compile(r"<!-- *(not run|slow)(?:: *(.*?))? *-->")
FENCE = re.compile(r"^( *)```(\w*)$")
TIMEOUT = 600  # seconds


class Block(NamedTuple):
    page: Path
    line: int  # number of the line that opens the block, from 1
    language: str
    code: str
    marker: str  # "", "not run" or "slow"
    reason: str | None


def blocks_of(page: Path) -> list[Block]:
    found, start, lines = [], None, page.read_text(encoding="utf-8").splitlines()
    for i, line in enumerate(lines):
        fence = FENCE.match(line)
        if fence and start is None:
            start, language = i, fence[2]
        elif fence and start is not None:
            marked = MARKER.fullmatch(lines[start - 1].strip()) if start else None
            marker, reason = marked.groups() if marked else ("", None)
            code = "\n".join(lines[start + 1 : i])
            found.append(Block(page, start + 1, language, code, marker, reason))
            start = None
    assert start is None, f"{page.name}:{start + 1} opens a block that does not end"
    return found


BLOCKS = {page: blocks_of(page) for page in PAGES}


def commands_of(block: Block) -> list[str]:
    """Returns the commands of a shell block without comments. Joins continued lines."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s)#.*", "", x).strip() for x in lines) if line]


def python_programs() -> Iterator:
    """Yields the quick blocks of each page as one program. For a page with slow blocks, also yields
    all its blocks as one program."""
    for page, blocks in BLOCKS.items():
        runs = [x for x in blocks if x.language == "python" and x.marker != "not run"]
        quick = [x for x in runs if not x.marker]
        name = str(page.relative_to(ROOT))
        if quick:
            yield pytest.param(quick, id=name)
        if len(quick) < len(runs):
            yield pytest.param(runs, id=f"{name}, all", marks=pytest.mark.slow)


def shell_commands() -> Iterator:
    for page, blocks in BLOCKS.items():
        for block in blocks:
            if block.language not in ("bash", "sh") or block.marker == "not run":
                continue
            marks = [pytest.mark.slow] if block.marker == "slow" else []
            for command in commands_of(block):
                name = f"{page.relative_to(ROOT)}: {command}"
                yield pytest.param(command, id=name, marks=marks)


PROGRAMS, COMMANDS = list(python_programs()), list(shell_commands())


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Returns the environment of the commands: this Python is first on PATH, PYTHONPATH is this
    clone, and Triton's interpreter, which conftest.py turns on, is off."""
    rest = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    threads = {"OMP_NUM_THREADS": "1"}  # one, because pytest runs a process per core
    return rest | threads | {"PATH": os.pathsep.join(paths), "PYTHONPATH": str(ROOT)}


def run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, timeout=TIMEOUT,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-4000:]}"


@pytest.mark.parametrize("blocks", PROGRAMS)
def test_python_blocks_run(blocks, environment, request):
    program = "\n".join(block.code for block in blocks)
    if "demo_checkpoint" in program:
        request.getfixturevalue("demo_gguf")  # skips the test without the extra `demo`
    run([sys.executable, "-c", program], environment)


@pytest.mark.parametrize("command", COMMANDS)
def test_shell_commands_run(command, environment, request):
    name = command.split()[0]
    installed = shutil.which(name, path=environment["PATH"]) is not None
    if name == "gemma-fast":
        request.getfixturevalue("demo_gguf")
        if not installed:  # a clone that is not installed
            command = command.replace("gemma-fast", "python -m gemma_fast", 1)
    elif not installed:
        pytest.skip(f"{name} is not installed")
    elif name == "make":
        command = command.replace("make", "make -n", 1)  # prints what the target would run
    run(["bash", "-c", command], environment)


def test_enough_blocks_run():
    """If the format of the pages changes, the tests above must not silently lose their cases."""
    assert sum(len(x.values[0]) for x in PROGRAMS if not x.marks) >= 5
    assert sum(block.marker == "slow" for blocks in BLOCKS.values() for block in blocks) >= 5
    assert len(COMMANDS) >= 8
    assert {"gemma-fast", "python", "make"} <= {x.values[0].split()[0] for x in COMMANDS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_marked_block_gives_a_reason(page):
    blocks = BLOCKS[page]
    for block in blocks:
        where = f"{page.name}:{block.line}"
        assert block.language, f"{where}: the block has no language"
        assert not block.marker or block.reason, f"{where}: {block.marker!r} has no reason"
    placed = len(MARKER.findall(page.read_text(encoding="utf-8")))
    assert placed == sum(bool(x.marker) for x in blocks), "a marker is not directly before a block"


def markdown(page: Path) -> str:
    """Returns the Markdown of a page or of a notebook's Markdown cells, without code blocks."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(x["source"]) for x in cells if x["cell_type"] == "markdown")
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.S | re.M)


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub gives to the page's headings. In a notebook they are those of
    nbconvert, which keeps case and punctuation."""
    headings = re.findall(r"^#+ (.*)$", markdown(page), flags=re.M)
    if page.suffix != ".ipynb":
        headings = [re.sub(r"[^\w\- ]", "", x.lower()) for x in headings]
    return {x.replace(" ", "-") for x in headings}


@pytest.mark.parametrize("page", [*PAGES, NOTEBOOK], ids=lambda page: page.name)
def test_targets_of_links_exist(page):
    text = re.sub(r"`[^`\n]*`", "", markdown(page))
    defined = dict(re.findall(r"^\[([^\]]+)\]: *(\S+)$", text, flags=re.M))
    shortcuts = re.findall(r"\[([\w./-]+\.\w+)\](?![\[(:])", text)
    assert {*shortcuts} <= {*defined}, "a link has no definition"
    for target in [*re.findall(r"\]\(([^)\s]+)\)", text), *defined.values()]:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(file), f"{page.name}: no heading for {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_table_cells_are_filled(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    for i, line in enumerate(lines):
        header = i + 1 < len(lines) and re.match(r"^\|[-:| ]+\|$", lines[i + 1])
        if not line.startswith("|") or header:
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
        assert all(cells), f"{page.name}:{i + 1}: a cell is empty"
        assert "not measured" not in line.lower(), f"{page.name}:{i + 1}: no value"


def test_docs_list_every_gate():
    text = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    table = text.split("| gate | what it checks |\n|---|---|\n")[1].split("\n\n")[0]
    assert re.findall(r"^\| (.*?) \|", table, flags=re.M) == list(GATES)


def test_readme_is_short():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert not [line for line in lines if len(line) > 120]
