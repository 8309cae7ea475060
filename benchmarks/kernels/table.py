"""Collects all kernel suites and checks from the files of this folder, and lists the packages that
rivals need."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

from gemma_fast.benchmarks.kernels.suite import Suite
from gemma_fast.benchmarks.measure.machine import installed_version

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

# Packages on PyPI that providers need besides torch: provider → names of the packages. Providers
# whose names begin with transformers are not listed here; `missing` adds their package.
PACKAGES = {
    "liger": ["liger-kernel"],
    "liger (CuTe)": ["liger-kernel", "nvidia-cutlass-dsl"],
    "quack": ["quack-kernels"],
    "flashinfer": ["flashinfer-python"],
    "flash-attn-4": ["flash-attn-4"],
}
RIVALS = sorted({package for packages in PACKAGES.values() for package in packages})


def missing(provider: str) -> list[str]:
    """Returns the packages that the provider needs but that are not installed."""
    needed = ["transformers"] if provider.startswith("transformers") else PACKAGES.get(provider, [])
    return [x for x in needed if installed_version(x) is None]
