"""Measures what packed weights cost: the packed model against the unpacked one in float32.

The unpacked model has the weights of the file. Beside each figure stands that of the unpacked model
in the packed model's dtype, which shows what the dtype alone costs. If --quantize rounded weights,
their error stands beside that of plain rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import click
import torch
from torch import Tensor

from gemma_fast.benchmarks.measure.outcome import full_precision
from gemma_fast.benchmarks.model.cases import Case
from gemma_fast.benchmarks.model.providers import Ours
from gemma_fast.benchmarks.verify import margins as of
from gemma_fast.benchmarks.verify.ids import TEXTS, read_text
from gemma_fast.benchmarks.verify.margins import Finding, finding
from gemma_fast.benchmarks.verify.model import closeness
from gemma_fast.checkpoint.base import Checkpoint
from gemma_fast.checkpoint.random import RandomCheckpoint
from gemma_fast.checkpoint.rounded import READ, RoundedCheckpoint
from gemma_fast.text.tokenizer import Tokenizer

TOKENS = 384  # of each text; logits of 384 tokens take 0.4 GB in float32
FIGURES = (of.KL_MEAN, of.KL_MAX, of.DELTA_MEAN, of.DELTA_MAX, of.TOP_1, of.PERPLEXITY)
CHECK = "{name}, {kind}: KL mean / max, |Δ logit| mean / max, top-1, perplexity change"
BYTES = "bytes a token"
WEIGHTS = "{kind}, relative RMS error of the weights, beside plain rounding"


def passages(checkpoint: Checkpoint, device: torch.device) -> dict[str, Tensor]:
    """Returns name → ids :: [1, t] of TEXTS, or random ids for random weights."""
    limit = min(TOKENS, checkpoint.config.max_position_embeddings)
    if isinstance(checkpoint, RandomCheckpoint):
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, checkpoint.config.vocab_size, (1, limit), generator=generator)
        return {"random ids": ids.to(device)}
    tokenizer = Tokenizer.from_pretrained(checkpoint.path)
    found = {name: tokenizer(read_text(name), return_tensors="pt").input_ids for name in TEXTS}
    return {name: ids[:, :limit].to(device) for name, ids in found.items()}


@torch.no_grad()
def check_cost(
    plain: Checkpoint, packed: Checkpoint, device: torch.device, dtypes: Sequence[torch.dtype]
) -> Iterator[Finding]:
    """Yields a finding for each text and dtype, one for the bytes that a decode step reads, and one
    for the weights that were rounded.

    plain, packed: the checkpoint as it was opened, and with packed weights
    """
    kind, texts = of.KEPT, passages(plain, device)
    if isinstance(packed, RoundedCheckpoint) and packed.rounded:
        kind = f"int{packed.bits}"
        errors = {f"{of.ROUNDING}, {kind}": rounding_errors(plain, packed)}
        yield finding(of.COST, WEIGHTS.format(kind=kind), torch.float32, errors)

    def run(checkpoint: Checkpoint, dtype: torch.dtype, how: str | None) -> tuple[Any, float]:
        """Returns the logits of each text, and the bytes of a decode step."""
        what = "packed" if how is None else "unpacked"
        click.echo(f"{what} weights, {dtype}".replace("torch.", ""), err=True)
        ours = Ours(checkpoint, dtype, device, how)
        found = {name: ours.model(ids, use_cache=False).logits[0] for name, ids in texts.items()}
        return found, Case("tg", 1).work(plain.config, dtype.itemsize, ours.sizes()).bytes

    with full_precision():
        exact = run(plain, torch.float32, "none")
        for dtype in dtypes:
            beside = exact if dtype == torch.float32 else run(plain, dtype, "none")
            found = run(packed, dtype, None)
            for name, ids in texts.items():
                figures = [closeness(x[name], exact[0][name], ids[0]) for x, _ in (found, beside)]
                pairs = {
                    f"{figure}, {kind}": (ours, other)
                    for figure, ours, other in zip(FIGURES, *figures, strict=True)
                }
                yield finding(of.COST, CHECK.format(name=name, kind=kind), dtype, pairs)
            yield finding(of.COST, BYTES, dtype, {BYTES: (found[1], beside[1])})


def rounding_errors(plain: Checkpoint, packed: RoundedCheckpoint) -> tuple[float, float]:
    """Returns the RMS error of the rounded weights, and that of plain rounding, whose scale is the
    group's largest |weight| over the largest integer. Both are relative to the weights' RMS."""
    sums = torch.zeros(3, dtype=torch.float64)  # of squares: weights, our errors, plain errors
    for name in packed.rounded:
        (count, dim), packing = packed.shapes[name], packed.packing(name)
        assert packing is not None
        step = max(READ // dim, 1)
        for start in range(0, count, step):
            rows = name, start, min(start + step, count)
            exact = plain.rows(*rows).float()
            groups = exact.unflatten(1, (-1, packing.group))  # [rows, groups, group]
            scale = groups.abs().amax(-1, keepdim=True) / (2 ** (packing.bits - 1) - 1)
            usual = (groups / scale).round_().nan_to_num_() * scale  # 0 / 0 in groups of zeros
            errors = exact, packed.rows(*rows) - exact, usual.flatten(1) - exact
            sums += torch.stack([x.square().sum(dtype=torch.float64) for x in errors])
    weights, ours, other = sums.sqrt().tolist()
    return ours / weights, other / weights
