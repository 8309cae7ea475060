"""The result of one provider in one dtype and one case."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma_fast.benchmarks.measure.machine import Roof, Work
from gemma_fast.benchmarks.measure.model_report import label
from gemma_fast.benchmarks.model.cases import ARRIVAL, PROMPT, Case


@dataclass(frozen=True)
class ModelResult:
    """The result of one provider in one dtype and one case.

    dtype: of the weights and activations; None: the provider has one of its own (llama.cpp)
    seconds: time of each repeat; token_seconds: time of each decode step in the additional pass
    """

    case: Case
    provider: str
    dtype: str | None
    status: str
    work: Work
    error: float | None = None  # see judge.Judge
    seconds: tuple[float, ...] = ()
    token_seconds: tuple[float, ...] = ()
    peak_bytes: int | None = None  # GPU memory; includes weights and graphs, not the judge
    memory: dict[str, float] = field(default_factory=dict)
    size_bytes: float | None = None  # of the weights; None: not known
    took: float = 0.0  # total seconds; a provider's first result includes loading its weights

    @property
    def label(self) -> str:
        return label(self.provider, self.dtype)

    @property
    def typical(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    def figures(self, roof: Roof | None) -> dict[str, Any]:
        """Returns rates, times and memory, or an empty dict if the result was not timed. Rates
        count the tokens of all sequences in the batch; at an arrival, the new tokens of all texts.
        """
        if roof is None or (median := self.typical) is None:
            return {}
        roof = roof.of(self.dtype)
        tokens = self.case.total
        rates = [tokens / seconds for seconds in self.seconds]
        found = {
            "tokens_per_s": tokens / median,
            "tokens_per_s_sd": statistics.stdev(rates) if len(rates) > 1 else None,
            "samples_s": self.seconds, "peak_memory_bytes": self.peak_bytes, "memory": self.memory,
        }  # fmt: skip
        if self.case.kind == ARRIVAL:
            return found | {"total_s": median}
        if self.case.kind == PROMPT:
            mfu = self.work.flops / median / roof.product
            of_kind = {"time_to_first_token_s": median, "mfu": mfu}
        else:
            of_kind = {
                "token_p50_s": statistics.median(self.token_seconds),
                "token_p99_s": percentile(self.token_seconds, 99),
                "mbu": self.work.bytes / median / roof.copy,
            }
        return found | {
            "bytes": self.work.bytes, "flops": self.work.flops,
            "bytes_per_token": self.work.bytes / tokens, **of_kind,
            "token_samples_s": self.token_seconds,
        }  # fmt: skip


def percentile(values: Sequence[float], percent: int) -> float:
    doubled = [*values, *values[:1]] if len(values) == 1 else values
    return statistics.quantiles(doubled, n=100, method="inclusive")[percent - 1]
