"""Figures of the certificate, the margins that they may differ by, and a verdict a finding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

ERRORS = "error, max / RMS in ulp"
ON_GPU, INTERPRETER = f"Kernels on the GPU: {ERRORS}", f"Kernels in Triton's interpreter: {ERRORS}"
CPU_PATH, MODEL = f"The CPU path, the kernels' references: {ERRORS}", "model"


class Margin(NamedTuple):
    """(factor, slack) in float32 and in 16 bits, and why so."""

    float32: tuple[float, float]
    half: tuple[float, float]
    why: str


MAX_ULP, RMS_ULP, CHOICE_ULP = "max ulp", "RMS ulp", "ulp under the best"
KL_MEAN, KL_MAX = "KL mean", "KL max"
DELTA_MEAN, DELTA_MAX = "|Δ| mean", "|Δ| max"
TOP_1, PERPLEXITY = "top-1 agreement", "perplexity change"
ALIKE, GAP = "greedy tokens until they part", "largest gap"
BATCH_DELTA, BATCH_ALIKE = "|Δ| max, batch 8", "greedy texts alike"
BATCH_GAP = "largest gap, batch 8"
LOGITS_VARY, TOKENS_VARY = "logits that vary", "tokens that vary"
NOISE = "in float32 sums in another order, and exp and rsqrt of a GPU"
MARGINS = {
    RMS_ULP: Margin((2, 2), (1.1, 0.05), f"{NOISE}; in 16 bits no step more is rounded"),
    MAX_ULP: Margin((3, 16), (1.5, 1), "the largest of many errors scatters"),
    CHOICE_ULP: Margin((2, 16), (1.5, 2), "of a chosen token's logit; near-ties fall either way"),
    KL_MEAN: Margin((2, 1e-8), (1.25, 1e-5), "two roundings of one model differ by as much"),
    KL_MAX: Margin((3, 1e-6), (2, 1e-3), "the largest of many scatters"),
    DELTA_MEAN: Margin((2, 1e-4), (1.1, 1e-3), "of logits; two roundings differ by as much"),
    DELTA_MAX: Margin((3, 1e-3), (1.5, 0.05), "the largest of many scatters"),
    TOP_1: Margin((1, -0.002), (1, -0.02), "at least; near-ties fall either way"),
    PERPLEXITY: Margin((2, 1e-5), (1.5, 0.005), "of the text, relative to the reference's"),
    GAP: Margin((0, 1e-3), (2, 0.25), "a token chosen may lie so far under the reference's best"),
    BATCH_DELTA: Margin((3, 1e-3), (1.5, 0.05), "batch 8 takes other sums than batch 1"),
    BATCH_GAP: Margin((0, 1e-3), (2, 0.25), "a token chosen in a batch, under what is best alone"),
    LOGITS_VARY: Margin((0, 0), (0, 0), "same input, same bits"),
    TOKENS_VARY: Margin((0, 0), (0, 0), "same input, same tokens"),
}  # fmt: skip
AT_LEAST = {TOP_1}


class Figure(NamedTuple):
    name: str
    ours: float
    eager: float | None  # None: not measured
    limit: float | None  # None: shown, not judged

    @property
    def ok(self) -> bool:
        if self.limit is None:
            return True
        ours = abs(self.ours)
        return ours >= self.limit if self.name in AT_LEAST else ours <= self.limit


@dataclass(frozen=True)
class Finding:
    part: str
    check: str
    dtype: str
    figures: tuple[Figure, ...]
    note: str = ""  # what a check raised

    @property
    def ok(self) -> bool:
        return not self.note and all(figure.ok for figure in self.figures)

    def as_dict(self) -> dict[str, Any]:
        figures = [figure._asdict() for figure in self.figures]
        return asdict(self) | {"figures": figures, "verdict": "pass" if self.ok else "FAIL"}

    @classmethod
    def of_dict(cls, given: dict[str, Any]) -> Finding:
        figures = tuple(Figure(**figure) for figure in given["figures"])
        return cls(given["part"], given["check"], given["dtype"], figures, given["note"])


def finding(
    part: str, check: str, dtype: torch.dtype,
    pairs: Mapping[str, tuple[float, float | None]], note: str = "",
) -> Finding:  # fmt: skip
    """pairs: a figure's name → ours, eager's; MARGINS gives the limit."""
    figures = []
    for name, (ours, eager) in pairs.items():
        limit = None
        if name in MARGINS:
            margin = MARGINS[name]
            factor, slack = margin.float32 if dtype == torch.float32 else margin.half
            limit = factor * abs(eager or 0) + slack
        figures.append(Figure(name, ours, eager, limit))
    return Finding(part, check, str(dtype).removeprefix("torch."), tuple(figures), note)
