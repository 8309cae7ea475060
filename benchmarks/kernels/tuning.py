"""Launch configs that benchmarks.tune tries in place of those of a kernel's table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from gemma_fast.benchmarks.measure.outcome import OURS

Size = dict[str, Any]
Config = dict[str, int]
Choices = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Tuning:
    """The kernel, by its name in kernels.launch, and what to try at a size."""

    kernel: str
    choices: Callable[[Size], Choices]

    def candidates(self, size: Size) -> dict[str, Config]:
        """Every combination of the choices, by name."""
        choices = self.choices(size)
        configs = (dict(zip(choices, x, strict=True)) for x in product(*choices.values()))
        return {", ".join([OURS, *(f"{k} {v}" for k, v in x.items())]): x for x in configs}


def matmul_choices(size: Size, one_row: Choices) -> Choices:
    """Several rows are multiplied on the tensor cores, with other choices than one."""
    several = {"BLOCK_N": (16, 32, 64), "BLOCK_K": (128, 256, 512), "STAGES": (3, 4, 6)}
    return several if size["b"] > 1 else one_row
