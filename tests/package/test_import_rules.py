"""Tests that imports follow the table RULES, and that the docstring of each room lists its rule.

A room is a folder of gemma_fast.

Imports are read from the source files. Imports inside functions, under TYPE_CHECKING, and in the
two folders behind symlinks (kernels, benchmarks) count too.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "gemma_fast"
EVERYTHING = "everything in gemma_fast but cli"
# For each room or module of gemma_fast: the other rooms and modules that it may import.
RULES = {
    "ranges": "", "config": "ranges", "presets": "config",
    "memory": "", "compat": "", "demo": "", "kernels": "", "hf": "kernels",
    "checkpoint": "config, kernels, ranges",
    "text": "compat, checkpoint.hub, checkpoint.gguf_reader",
    "model": "config, kernels",
    "reference_steps": "config", "reference": "config, checkpoint, reference_steps",
    "engine": "config, kernels.cpu, memory, compat, model",
    "load": "config, kernels, memory, checkpoint, model",
    "arguments": "engine, load, model",
    "causal_lm": "arguments, config, compat, checkpoint, model, engine, load",
    "batch": "causal_lm, compat, engine, text",
    "lm_scoring": "causal_lm, text, batch.scoring",
    "lm_harness": "causal_lm, compat, text, lm_scoring",
    "benchmarks.measure": "kernels",
    "benchmarks.kernels": "benchmarks.measure, kernels, reference",
    "benchmarks.model": EVERYTHING,
    "benchmarks.verify": EVERYTHING,
    "benchmarks": EVERYTHING,
    "walkthrough": "__init__, checkpoint, config, load, memory, reference, reference_steps, text",
    "server": "causal_lm, compat, demo, engine, text",
    "cli": "compat, causal_lm, text, demo, batch, server, benchmarks, walkthrough",
    "__main__": "cli",
    "__init__": "config, presets, causal_lm, engine, model, reference, text",
}  # fmt: skip


def modules() -> dict[str, ast.Module]:
    """Returns each module's syntax tree by name: "engine.decoder", or "engine" for its __init__."""
    found = {}
    for folder in (PACKAGE, *(x for x in PACKAGE.rglob("*") if x.is_dir()), *links()):
        for file in folder.glob("*.py"):
            name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
            name = name.removesuffix(".__init__")
            if name.split(".")[-1] not in ("conftest", "test_kernels"):  # pytest files
                found[name] = ast.parse(file.read_text())
    return found


def links() -> list[Path]:
    """Returns the folders that rglob does not find because of symlinks, as paths in gemma_fast."""
    targets = [PACKAGE / "kernels", PACKAGE / "kernels" / "cpu", PACKAGE / "benchmarks"]
    rooms = [room for room in (ROOT / "benchmarks").iterdir() if (room / "__init__.py").exists()]
    return targets + [PACKAGE / "benchmarks" / room.name for room in rooms]


SOURCES = modules()


def imported(source: ast.AST) -> set[str]:
    """Returns the names of the imported modules, without the prefix "gemma_fast.".

    `from x import y` gives x.y if that is a module of gemma_fast, otherwise x.
    """
    found = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not allowed"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            inner = {x for x in whole if x.removeprefix("gemma_fast.") in SOURCES}
            found |= inner | ({str(node.module)} if whole - inner else set())
    return {x.removeprefix("gemma_fast.") if x != "gemma_fast" else "__init__" for x in found}


IMPORTS = {name: imported(source) for name, source in SOURCES.items()}
OURS = {name: {x for x in names if x in SOURCES} for name, names in IMPORTS.items()}


def room_of(module: str) -> str:
    """Returns the most specific key of RULES that applies to this module."""
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in (2, 1)]
    return next(name for name in names if name in RULES)


def within(module: str, place: str) -> bool:
    return f"{module}.".startswith(f"{place}.")


def test_docstring_of_every_room_lists_its_allowed_imports():
    rooms = [x.parent.relative_to(PACKAGE) for x in PACKAGE.glob("*/__init__.py")]
    benchmarks = ROOT / "benchmarks"
    rooms += [Path("benchmarks", x.parent.name) for x in benchmarks.glob("*/__init__.py")]
    for room in rooms:
        name = ".".join(room.parts)
        docstring = ast.get_docstring(SOURCES[name]) or ""
        said = re.search(r"\nMay import: (.*?)\.$", docstring, re.S)
        assert said and " ".join(said[1].split()) == RULES[name], f"{name}: {docstring}"
        assert name == "hf" or len(SOURCES[name].body) == 1, f"{name}/__init__.py has code"
    assert len(list(PACKAGE.glob("*.py"))) <= 16


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_follow_the_rules(module):
    room = room_of(module)
    allowed = RULES[room].split(", ")
    for name in OURS[module]:
        if allowed == [EVERYTHING]:
            commands = ("cli", "__main__")
            assert room_of(name) not in commands, f"{module} imports {name}"
        elif room_of(name) != room:
            allows = any(within(name, x) for x in allowed if x)
            assert allows, f"{module} imports {name}; {room} may import: {allowed}"
        folder, _, last = name.rpartition(".")
        private = last.startswith("_") and not last.startswith("__")
        assert not private or within(module, folder), f"{module} imports {name}"


def test_every_allowed_import_is_used():
    for room, allowed in RULES.items():
        used = {name for module in SOURCES if room_of(module) == room for name in OURS[module]}
        for place in allowed.split(", ") if allowed not in ("", EVERYTHING) else ():
            assert any(within(name, place) for name in used), f"{room} imports nothing from {place}"


def test_kernels_import_only_torch_and_triton():
    for module in SOURCES:
        if room_of(module) == "kernels":
            others = {name.split(".")[0] for name in IMPORTS[module] - OURS[module]}
            assert others - sys.stdlib_module_names <= {"torch", "triton"}, module


def test_benchmarks_are_imported_only_inside_functions():
    """An import at module level would make --help slow."""
    for module in SOURCES:
        if not within(module, "benchmarks"):
            commands = [node for node in SOURCES[module].body if isinstance(node, ast.FunctionDef)]
            rest = ast.Module([x for x in SOURCES[module].body if x not in commands], [])
            for name in imported(rest):
                assert not within(name, "benchmarks"), f"{module} imports {name} at module level"


def test_there_are_no_import_cycles():
    done, path = set(), []

    def visit(module: str) -> None:
        assert module not in path, f"import cycle: {' → '.join([*path, module])}"
        if module not in done:
            path.append(module)
            for name in OURS[module] - {module}:
                visit(name)
            done.add(path.pop())

    for module in SOURCES:
        visit(module)
