"""The figures that `gemma-fast verify` prints, the limit for each, and the verdict of each check.

A figure is one number of a check, such as the largest error. It is measured for gemma_fast (`ours`)
and for the usual implementation (`eager`), which is eager PyTorch or, for the whole model,
transformers. A margin gives the limit of our figure: factor × eager's + slack. A finding is the
result of one check in one dtype: its figures and the verdict, pass or FAIL. Each finding is printed
as one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

ERRORS = "error, max / RMS in ulp"
ON_GPU, INTERPRETER = f"Kernels on the GPU: {ERRORS}", f"Kernels in Triton's interpreter: {ERRORS}"
CPU_PATH, MODEL = f"The CPU path, the kernels' references: {ERRORS}", "model"


class Margin(NamedTuple):
    """The pair (factor, slack) for float32 and for 16-bit dtypes, and the reason for both."""

    float32: tuple[float, float]
    half: tuple[float, float]
    why: str


MAX_ULP, RMS_ULP, CHOICE_ULP = "max ulp", "RMS ulp", "ulp below the best"
KL_MEAN, KL_MAX = "KL mean", "KL max"
DELTA_MEAN, DELTA_MAX = "|Δ| mean", "|Δ| max"
TOP_1, PERPLEXITY = "top-1 agreement", "perplexity change"
ALIKE, GAP = "greedy tokens until they differ", "largest gap"
BATCH_DELTA, BATCH_ALIKE = "|Δ| max, batch 8", "equal greedy texts"
BATCH_GAP = "largest gap, batch 8"
LOGITS_VARY, TOKENS_VARY = "logits that vary", "tokens that vary"
IDS_DIFFER, ENDS_DIFFER = "ids that differ", "end tokens that differ"
NOISE = "float32 sums in another order, exp and rsqrt of the GPU"
MARGINS = {
    RMS_ULP: Margin((2, 2), (1.1, 0.05), f"{NOISE}; 16 bits allow no additional rounding"),
    MAX_ULP: Margin((3, 16), (1.5, 1), "the largest of many errors varies"),
    CHOICE_ULP: Margin((2, 16), (1.5, 2), "a near-tie may give either token"),
    KL_MEAN: Margin((2, 1e-8), (1.25, 1e-5), "two roundings of one model differ this much"),
    KL_MAX: Margin((3, 1e-6), (2, 1e-3), "the largest of many values varies"),
    DELTA_MEAN: Margin((2, 1e-4), (1.1, 1e-3), "two roundings of one model differ this much"),
    DELTA_MAX: Margin((3, 1e-3), (1.5, 0.05), "the largest of many values varies"),
    TOP_1: Margin((1, -0.002), (1, -0.02), "a minimum; a near-tie may give either token"),
    PERPLEXITY: Margin((2, 1e-5), (1.5, 0.005), "relative to the truth's perplexity"),
    GAP: Margin((0, 1e-3), (2, 0.25), "the truth's best logit minus the token's logit"),
    BATCH_DELTA: Margin((3, 1e-3), (1.5, 0.05), "batch 8 sums in another order than batch 1"),
    BATCH_GAP: Margin((0, 1e-3), (2, 0.25), "best logit with batch 1 minus the token's logit"),
    LOGITS_VARY: Margin((0, 0), (0, 0), "same input, same bits"),
    TOKENS_VARY: Margin((0, 0), (0, 0), "same input, same tokens"),
    IDS_DIFFER: Margin((0, 0), (0, 0), "same text, same ids"),
    ENDS_DIFFER: Margin((0, 0), (0, 0), "a text must end at the same tokens"),
}  # fmt: skip
# Errors of the packed model against the unpacked model in float32. The limits are relative to the
# unpacked model in the packed one's dtype. "as stored": weights that the file has packed; "int8":
# weights that --quantize rounds. The loss by "int4" depends on the model, so only the error of its
# rounding has a limit.
KEPT = "as stored"
COST = "Packed weights against unpacked ones, in float32"
_SCALES, _INT8 = "scales lose less than a rounding to 16 bits", "8 bits lose a few times as much"
for _name, _kind, _margin, _why in (
    (KL_MEAN, KEPT, (2, 1e-4), _SCALES),
    (DELTA_MEAN, KEPT, (2, 1e-3), _SCALES),
    (PERPLEXITY, KEPT, (1, 0.01), "1 % of perplexity"),
    (KL_MEAN, "int8", (2, 0.01), _INT8),
    (PERPLEXITY, "int8", (1, 0.01), "1 % of perplexity"),
):
    MARGINS[f"{_name}, {_kind}"] = Margin(_margin, _margin, _why)
# Error of the weights, against that of plain rounding: the largest |weight| of a group / 127 or / 7
ROUNDING = "rounding"
for _kind, _factor, _why in (
    ("int8", 1.02, "plain rounding; scales of tiny weights are rounded up"),
    ("int4", 0.95, "the scale is searched for less error"),
):
    MARGINS[f"{ROUNDING}, {_kind}"] = Margin((_factor, 3e-4), (_factor, 3e-4), _why)
AT_LEAST = {TOP_1}  # figures whose limit is a minimum
# Figures that compare tokens or logits of single positions. In a mixture of experts, a rounding to
# 16 bits may choose other experts for a token, which changes its logits by more than the rounding.
# So their limits are larger by eager's |Δ| max, which contains such changes.
CHANGED_BY_EXPERTS = {GAP, BATCH_DELTA, BATCH_GAP}


class Figure(NamedTuple):
    name: str
    ours: float
    eager: float | None  # None if it was not measured
    limit: float | None  # None if the figure has no limit

    @property
    def ok(self) -> bool:
        if self.limit is None:
            return True
        ours = abs(self.ours)
        return ours >= self.limit if self.name in AT_LEAST else ours <= self.limit


@dataclass(frozen=True)
class Finding:
    part: str  # title of the table that contains this line, or MODEL
    check: str
    dtype: str
    figures: tuple[Figure, ...]
    note: str = ""  # the exception that the check raised

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
    pairs: Mapping[str, tuple[float, float | None]], note: str = "", by_experts: float = 0.0,
) -> Finding:  # fmt: skip
    """Returns a finding whose figures have the limits of MARGINS.

    pairs: name of the figure → (our number, eager's number)
    by_experts: is added to the limits of CHANGED_BY_EXPERTS
    """
    figures = []
    for name, (ours, eager) in pairs.items():
        limit = None
        if name in MARGINS:
            margin = MARGINS[name]
            factor, slack = margin.float32 if dtype == torch.float32 else margin.half
            limit = factor * abs(eager or 0) + slack
            limit += by_experts * (name in CHANGED_BY_EXPERTS)
        figures.append(Figure(name, ours, eager, limit))
    return Finding(part, check, str(dtype).removeprefix("torch."), tuple(figures), note)
