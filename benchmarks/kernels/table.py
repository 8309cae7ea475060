"""Collects all kernel suites (by name) and all checks from the other files in this folder."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

from gemma_fast.benchmarks.kernels.suite import Suite

NO_SUITES = ("__init__", "rivals", "suite", "table")


def _suites(module: ModuleType) -> dict[str, Suite]:
    return {x.name: x for x in vars(module).values() if isinstance(x, Suite)}


_modules = [
    import_module(f"gemma_fast.benchmarks.kernels.{file.stem}")
    for file in sorted(Path(__file__).parent.glob("*.py"))
    if file.stem not in NO_SUITES
]
SUITES = {name: suite for module in _modules for name, suite in _suites(module).items()}
CHECKS = [check for module in _modules for check in module.CHECKS]
