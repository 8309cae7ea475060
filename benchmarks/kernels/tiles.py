"""Launch configurations that benchmarks.tune tries: tile sizes, warps, stages.

Launchers ask their module's table, a function `tile`, for a dict. What follows here is put in its
place, which changes nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product
from types import ModuleType
from typing import Any
from unittest.mock import patch

from gemma_fast.benchmarks.measure.outcome import OURS

Size = dict[str, Any]
Tile = dict[str, int]
Choices = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Tiles:
    """Where a launcher looks its tile up, and what to try in place of what it finds there."""

    module: ModuleType
    choices: Callable[[Size], Choices]
    function: str = "tile"

    def candidates(self, size: Size) -> dict[str, Tile]:
        """Every combination of the choices, by name."""
        choices = self.choices(size)
        tiles = (dict(zip(choices, x, strict=True)) for x in product(*choices.values()))
        return {", ".join([OURS, *(f"{k} {v}" for k, v in x.items())]): x for x in tiles}

    def using(self, tile: Tile) -> AbstractContextManager[Any]:
        """Within it, the launcher finds this tile; what it does not say is the table's."""
        says = getattr(self.module, self.function)
        return patch.object(self.module, self.function, lambda *args: says(*args) | tile)


def product_tiles(size: Size, one_row: Choices) -> Choices:
    """Several rows are multiplied on the tensor cores, with other choices than one."""
    several = {"BLOCK_N": (16, 32, 64), "BLOCK_K": (128, 256, 512), "STAGES": (3, 4, 6)}
    return several if size["b"] > 1 else one_row
