"""Rotary embedding: cos and sin of every position's angles, which a model's caches share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma_fast.config import FULL, GemmaConfig

Tables = dict[str, tuple[Tensor, Tensor]]


class Rope:
    """Tables of a config, one set a device; copies of a model make their own."""

    def __init__(self, config: GemmaConfig) -> None:
        self.config = config
        self._tables: dict[torch.device, Tables] = {}

    def tables(self, positions: int, device: torch.device) -> Tables:
        """Kind of layer → cos, sin :: [at least `positions`, d / 2], fp32; row p is of position p.

        Longer ones replace shorter ones, which live on in the caches and graphs that use them.
        """
        made = self._tables.get(device)
        if made is None or len(next(iter(made.values()))[0]) < positions:
            with torch.inference_mode(False):  # for callers in and out of inference mode
                made = _tables(self.config, positions, device)
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()  # other streams may use them, too
            self._tables[device] = made
        return made

    @property
    def nbytes(self) -> int:
        """Bytes on all devices."""
        kinds = (kind for tables in self._tables.values() for kind in tables.values())
        return sum(cos.nbytes + sin.nbytes for cos, sin in kinds)

    def clear(self) -> None:
        self._tables.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return Rope, (self.config,)


def _tables(config: GemmaConfig, positions: int, device: torch.device) -> Tables:
    """The angle of channel i at position p is p * theta^(-2i / d)."""
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
