"""Who may import whom: each room's __init__.py says it in its last line, and this test holds it.

Imports are read from the sources, those inside functions and under TYPE_CHECKING too, through both
links. A name in a line `May import:` is a room or a module of gemma_fast.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "gemma_fast"
EVERYTHING = "everything in gemma_fast but cli"
# What is no room, or has no __init__.py.
RULES = {
    "kernels": "", "config": "", "memory": "", "compat": "", "demo": "",
    "reference": "config, checkpoint", "load": "config, memory, checkpoint, model",
    "causal_lm": "config, memory, compat, checkpoint, model, engine, load",
    "lm_harness": "causal_lm, text", "cli": "causal_lm, text, demo, benchmarks", "__main__": "cli",
    "__init__": EVERYTHING,
}  # fmt: skip


def modules() -> dict[str, ast.Module]:
    """Each module, "engine.decoder", and its source; a room's __init__ is "engine"."""
    found = {}
    for folder in (PACKAGE, *(x for x in PACKAGE.rglob("*") if x.is_dir()), *links()):
        for file in folder.glob("*.py"):
            name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
            name = name.removesuffix(".__init__")
            if name.split(".")[-1] not in ("conftest", "test_kernels"):  # pytest's
                found[name] = ast.parse(file.read_text())
    return found


def links() -> list[Path]:
    """The folders behind the links, which rglob does not follow, by their names in gemma_fast."""
    targets = [PACKAGE / "kernels", PACKAGE / "benchmarks"]
    rooms = [room for room in (ROOT / "benchmarks").iterdir() if (room / "__init__.py").exists()]
    return targets + [PACKAGE / "benchmarks" / room.name for room in rooms]


SOURCES = modules()


def imported(source: ast.AST) -> set[str]:
    """Dotted names, of this package without "gemma_fast."; names in a module count as it."""
    found = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not used"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            inner = {x for x in whole if x.removeprefix("gemma_fast.") in SOURCES}
            found |= inner | ({str(node.module)} if whole - inner else set())
    return {x.removeprefix("gemma_fast.") if x != "gemma_fast" else "__init__" for x in found}


IMPORTS = {name: imported(source) for name, source in SOURCES.items()}
OURS = {name: {x for x in names if x in SOURCES} for name, names in IMPORTS.items()}


def room_of(module: str) -> str:
    """The longest name that has a rule: a room of benchmarks, a room, or the module itself."""
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in (2, 1)]
    return next(name for name in names if name in rules())


def rules() -> dict[str, str]:
    found = dict(RULES)
    for name, source in SOURCES.items():
        if line := re.search(r"May import: (.*?)\.\s*$", ast.get_docstring(source) or "", re.S):
            found[name] = " ".join(line[1].split())
    return found


def test_every_room_says_what_it_is_and_what_it_may_import():
    rooms = [x.parent.relative_to(PACKAGE) for x in PACKAGE.glob("*/__init__.py")]
    rooms += [
        Path("benchmarks", x.parent.name) for x in (ROOT / "benchmarks").glob("*/__init__.py")
    ]
    for room in rooms:
        name = ".".join(room.parts)
        docstring = ast.get_docstring(SOURCES[name]) or ""
        assert docstring.split("\n")[0] and name in rules(), f"{name}: {docstring}"
        assert name.split(".")[0] == "hf" or len(SOURCES[name].body) == 1, f"{name} has code"
    assert len(list(PACKAGE.glob("*.py"))) <= 16


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_follow_the_rules(module):
    room = room_of(module)
    allowed = rules()[room].split(", ")
    for name in OURS[module]:
        if allowed == [EVERYTHING]:
            assert room_of(name) not in ("cli", "__main__"), f"{module} imports {name}"
        elif room_of(name) != room:
            within = any(f"{name}.".startswith(f"{x}.") for x in allowed if x)
            assert within, f"{module} imports {name}; {room} may import: {allowed}"
        folder, _, last = name.rpartition(".")
        private = last.startswith("_") and not last.startswith("__")
        assert not private or folder == module.rpartition(".")[0], f"{module} imports {name}"


def test_kernels_import_nothing_but_torch_and_triton():
    for module in SOURCES:
        if room_of(module) == "kernels":
            others = {name.split(".")[0] for name in IMPORTS[module] - OURS[module]}
            assert others - sys.stdlib_module_names <= {"torch", "triton"}, module


def test_only_commands_import_the_benchmarks():
    for module in SOURCES:
        if room_of(module).startswith("benchmarks"):
            continue
        lazy = ast.Module([node for node in ast.walk(SOURCES[module]) if inside_function(node)], [])
        at_the_top = imported(SOURCES[module]) - imported(lazy)
        assert not any(name.startswith("benchmarks") for name in at_the_top), module


def inside_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef)


def test_there_is_no_circle():
    done, path = set(), []

    def visit(module: str) -> None:
        assert module not in path, f"a circle: {' → '.join([*path, module])}"
        if module not in done:
            path.append(module)
            for name in OURS[module] - {module}:
                visit(name)
            done.add(path.pop())

    for module in SOURCES:
        visit(module)
