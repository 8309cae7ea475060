"""Computes the tables of cos and sin of the rotary embedding, which a model's caches share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma_fast.config import FULL, GemmaConfig

Tables = dict[str, tuple[Tensor, Tensor]]


class Rope:
    """Stores the rotary tables of a config, one set per device. A copy of a Rope has no tables."""

    def __init__(self, config: GemmaConfig) -> None:
        self.config = config
        self._tables: dict[torch.device, Tables] = {}

    def tables(self, positions: int, device: torch.device) -> Tables:
        """Returns layer type → cos, sin :: [≥ positions, d / 2], fp32; row p is for position p.

        Longer tables replace shorter tables. Caches and CUDA graphs keep the tables that they use.
        """
        made = self._tables.get(device)
        if made is None or len(next(iter(made.values()))[0]) < positions:
            with torch.inference_mode(False):  # the tables are also used outside inference mode
                made = _tables(self.config, positions, device)
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()  # other streams may read the tables
            self._tables[device] = made
        return made

    @property
    def nbytes(self) -> int:
        """Bytes of the tables on all devices."""
        kinds = (kind for tables in self._tables.values() for kind in tables.values())
        return sum(cos.nbytes + sin.nbytes for cos, sin in kinds)

    def clear(self) -> None:
        self._tables.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return Rope, (self.config,)


def _tables(config: GemmaConfig, positions: int, device: torch.device) -> Tables:
    """Returns layer type → cos, sin :: [positions, d / 2] of the rotary angles.

    Position p rotates channel pair i by the angle p * theta^(-2i / d). On full layers the angle is
    also divided by rope_scaling_factor.
    """
    position = torch.arange(positions, device=device).unsqueeze(1).float()
    i = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    tables = {}
    for kind in set(config.layer_types):
        full = kind == FULL
        theta = config.rope_theta if full else config.rope_local_base_freq
        inv_freq = 1 / theta ** (i / config.head_dim)
        angle = position * (inv_freq / config.rope_scaling_factor if full else inv_freq)
        tables[kind] = angle.cos(), angle.sin()
    return tables
