"""Computes the tables of cos and sin of the rotary embedding, which a model's caches share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gemma_fast.config import GemmaConfig, RopeParameters

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
    """Returns layer type → cos, sin :: [positions, d / 2] of the rotary angles, multiplied by the
    type's attention_factor."""
    position = torch.arange(positions, device=device).unsqueeze(1).float()
    tables = {}
    for kind in set(config.layer_types):
        rope = config.rope(kind)
        angle = position * inverse_frequencies(rope, config.head_dim_of(kind), device)
        tables[kind] = angle.cos() * rope.attention_factor, angle.sin() * rope.attention_factor
    return tables


def inverse_frequencies(rope: RopeParameters, d: int, device: torch.device) -> Tensor:
    """Returns the angle of each channel pair at position 1 :: [d / 2], fp32."""
    pair = torch.arange(0, d, 2, device=device, dtype=torch.float32)
    fast = 1 / rope.rope_theta ** (pair / d)
    if rope.rope_type == "default":
        return fast
    slow = fast / rope.factor
    if rope.rope_type == "linear":
        return slow
    if rope.rope_type == "proportional":
        return slow.where(pair < 2 * int(rope.partial_rotary_factor * d // 2), 0)
    share = _slow_share(rope, d).to(device)
    return slow * share + fast * (1 - share)


def _slow_share(rope: RopeParameters, d: int) -> Tensor:
    """Returns the weight of the divided frequency :: [d / 2], from 0 for fast pairs to 1 for slow
    pairs, as in YaRN."""
    first, last = (_pair_of(rope, d, turns) for turns in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, d - 1)
    if first == last:
        last += 0.001  # as in transformers: avoids a division by 0
    pairs = torch.arange(d // 2, dtype=torch.float32)
    return ((pairs - first) / (last - first)).clamp(0, 1)


def _pair_of(rope: RopeParameters, d: int, turns: float) -> float:
    """Returns the channel pair, as a fraction, that rotates `turns` times within the original
    context."""
    context, base = rope.original_max_position_embeddings, rope.rope_theta
    return d * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))
