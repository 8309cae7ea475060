"""The results of a model: `CausalLMOutput` of forward, and `GenerateOutput` of generate() with
return_dict_in_generate=True. Items can also be read by name, as in transformers: out["logits"].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from gemma_fast.engine.decoder import Record
from gemma_fast.model.cache import KVCache


def _item(self: Any, key: Any) -> Any:
    return getattr(self, key) if isinstance(key, str) else tuple.__getitem__(self, key)


def _keys(self: Any) -> tuple[str, ...]:
    """Returns the names of the items that are not None."""
    return tuple(name for name, value in self._asdict().items() if value is not None)


class CausalLMOutput(NamedTuple):
    """Result of a forward pass."""

    logits: Tensor  # [b, t, vocab], or [b, logits_to_keep, vocab]
    past_key_values: KVCache | None

    @property
    def cache(self) -> KVCache | None:
        """The cache under its name in transformers 5.24."""
        return self.past_key_values

    __getitem__, keys = _item, _keys  # type: ignore[misc]


class GenerateOutput(NamedTuple):
    sequences: Tensor  # [b, t + new], the prompts and the new tokens
    scores: tuple[Tensor, ...] | None  # of each new token [b, vocab], fp32: processed logits
    logits: tuple[Tensor, ...] | None  # of each new token [b, vocab], fp32: logits of the model

    past_key_values = cache = attentions = hidden_states = None  # type: ignore[misc]
    __getitem__, keys = _item, _keys  # type: ignore[misc]


class Outputs:
    """Decides what generate() returns. `record` is the list that needs each token's logits, or None
    if no logits are returned. As in transformers, output_scores and output_logits have an effect
    only with return_dict_in_generate."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._returns = [
            bool(options.get(name))
            for name in ("return_dict_in_generate", "output_scores", "output_logits")
        ]
        whole, scores, logits = self._returns
        self.record: Record | None = [] if whole and (scores or logits) else None

    def of(self, ids: Tensor) -> Tensor | GenerateOutput:
        whole, scores, logits = self._returns
        if not whole:
            return ids
        record = self.record or []
        return GenerateOutput(
            ids,
            tuple(processed for _, processed in record) if scores else None,
            tuple(raw for raw, _ in record) if logits else None,
        )
