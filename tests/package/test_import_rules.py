"""The table of import rules, and whether the code and the rooms' docstrings follow it.

Imports are read from the sources, those inside functions and under TYPE_CHECKING too, through both
links.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "gemma_fast"
EVERYTHING = "everything in gemma_fast but cli"
# A room or a module of gemma_fast → the rooms and modules that it may import beside itself.
RULES = {
    "config": "", "memory": "", "compat": "", "demo": "", "kernels": "", "hf": "kernels",
    "checkpoint": "config",
    "text": "compat, checkpoint.hub, checkpoint.gguf_reader",
    "model": "config, kernels",
    "reference": "config, checkpoint",
    "engine": "config, memory, compat, model",
    "load": "config, memory, checkpoint, model",
    "causal_lm": "config, compat, checkpoint, model, engine, load",
    "lm_harness": "causal_lm, text",
    "benchmarks.measure": "kernels",
    "benchmarks.kernels": "benchmarks.measure, kernels, reference",
    "benchmarks.model": EVERYTHING,
    "benchmarks.verify": EVERYTHING,
    "benchmarks": EVERYTHING,
    "cli": "causal_lm, text, demo, benchmarks",
    "__main__": "cli",
    "__init__": "config, causal_lm, engine, model, reference, text",
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
    """A room of benchmarks, a room, or the module itself."""
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in (2, 1)]
    return next(name for name in names if name in RULES)


def within(module: str, place: str) -> bool:
    return f"{module}.".startswith(f"{place}.")


def test_every_room_says_what_it_is_and_what_it_may_import():
    rooms = [x.parent.relative_to(PACKAGE) for x in PACKAGE.glob("*/__init__.py")]
    benchmarks = ROOT / "benchmarks"
    rooms += [Path("benchmarks", x.parent.name) for x in benchmarks.glob("*/__init__.py")]
    for room in rooms:
        name = ".".join(room.parts)
        docstring = ast.get_docstring(SOURCES[name]) or ""
        said = re.search(r"\nMay import: (.*?)\.$", docstring, re.S)
        assert said and " ".join(said[1].split()) == RULES[name], f"{name}: {docstring}"
        assert name == "hf" or len(SOURCES[name].body) == 1, f"{name} has code"
    assert len(list(PACKAGE.glob("*.py"))) <= 16


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_follow_the_rules(module):
    room = room_of(module)
    allowed = RULES[room].split(", ")
    for name in OURS[module]:
        if allowed == [EVERYTHING]:
            assert room_of(name) not in ("cli", "__main__"), f"{module} imports {name}"
        elif room_of(name) != room:
            allows = any(within(name, x) for x in allowed if x)
            assert allows, f"{module} imports {name}; {room} may import: {allowed}"
        folder, _, last = name.rpartition(".")
        private = last.startswith("_") and not last.startswith("__")
        assert not private or folder == module.rpartition(".")[0], f"{module} imports {name}"


def test_no_permission_is_unused():
    for room, allowed in RULES.items():
        used = {name for module in SOURCES if room_of(module) == room for name in OURS[module]}
        for place in allowed.split(", ") if allowed not in ("", EVERYTHING) else ():
            assert any(within(name, place) for name in used), f"{room} imports nothing of {place}"


def test_kernels_import_nothing_but_torch_and_triton():
    for module in SOURCES:
        if room_of(module) == "kernels":
            others = {name.split(".")[0] for name in IMPORTS[module] - OURS[module]}
            assert others - sys.stdlib_module_names <= {"torch", "triton"}, module


def test_only_commands_import_the_benchmarks():
    """And nothing else of cli, so that --help is quick."""
    for module in SOURCES:
        if not within(module, "benchmarks"):
            commands = [node for node in SOURCES[module].body if isinstance(node, ast.FunctionDef)]
            rest = ast.Module([x for x in SOURCES[module].body if x not in commands], [])
            for name in imported(rest):
                assert not within(name, "benchmarks"), f"{module} imports {name} at its top"


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
