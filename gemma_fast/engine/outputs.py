"""`GenerateOutput` is the result of generate(return_dict_in_generate=True)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from gemma_fast.engine.sampling import Record


class GenerateOutput(NamedTuple):
    sequences: Tensor  # [b, t + new], the prompts and the new tokens
    scores: tuple[Tensor, ...] | None  # of each new token [b, vocab], fp32: processed logits
    logits: tuple[Tensor, ...] | None  # of each new token [b, vocab], fp32: logits of the model


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
