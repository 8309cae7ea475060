"""Compares our model, and transformers' model in the same dtype, with the truth (see truth.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import click
import torch
from torch import Tensor

from gemma_fast.benchmarks.measure.outcome import OURS, full_precision
from gemma_fast.benchmarks.model.eager import Eager, positions
from gemma_fast.benchmarks.model.judge import under_the_best
from gemma_fast.benchmarks.verify import margins as of
from gemma_fast.benchmarks.verify.ids import read_text
from gemma_fast.benchmarks.verify.margins import MODEL, Finding, finding
from gemma_fast.benchmarks.verify.truth import Truth
from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.checkpoint.base import Checkpoint
from gemma_fast.checkpoint.random import RandomCheckpoint
from gemma_fast.load import refuse_overflow
from gemma_fast.memory import free_bytes
from gemma_fast.text.tokenizer import Tokenizer

RUNS, BATCH = 3, 8  # number of runs in the repeated-run check; batch size in the batch check
WRITTEN = 16  # tokens decoded per text, in the batch check and in the repeated-run check
CHUNK = 16  # tokens whose logits are converted to float64 at once

Figures = tuple[float, ...]
Greedy = Callable[[Any, Tensor, Tensor, int], Tensor]  # model, ids, mask, count → [b, count]


def text_ids(checkpoint: Checkpoint, tokens: int) -> Tensor:
    """Returns the ids :: [1, t] of ids.read_text, or random ids for a model with random weights.

    There are at most as many ids as leave room in the context for `tokens` new tokens. Raises
    ValueError if the context is too short.
    """
    config = checkpoint.config
    room = config.max_position_embeddings - max(tokens, WRITTEN)
    if room < 2 * BATCH:
        raise ValueError(f"{tokens=} leaves no room for a prompt in a context of {room + tokens}")
    if isinstance(checkpoint, RandomCheckpoint):
        generator = torch.Generator().manual_seed(0)
        return torch.randint(3, config.vocab_size, (1, min(room, 600)), generator=generator)
    ours = Tokenizer.from_pretrained(checkpoint.path)(read_text(), return_tensors="pt")
    return ours.input_ids[:, :room]


def dtypes_of(checkpoint: Checkpoint, device: torch.device, asked: str) -> list[torch.dtype]:
    """Returns the dtypes to check: the one named by `asked` or, if that is "auto", the device's
    usual dtypes (on a GPU, float32 only if the truth and a second model fit in memory). Raises
    ValueError if the model overflows in the dtype named by `asked`."""
    if asked != "auto":
        refuse_overflow(checkpoint.config, getattr(torch, asked))
        return [getattr(torch, asked)]
    if device.type == "cpu":
        return [torch.float32, torch.bfloat16]
    fits = 10 * checkpoint.config.num_parameters < free_bytes(device)
    dtypes = [torch.float32] * fits + [torch.bfloat16]
    with suppress(ValueError):
        refuse_overflow(checkpoint.config, torch.float16)
        dtypes.append(torch.float16)
    return dtypes


def our_greedy(model: GemmaForCausalLM, ids: Tensor, mask: Tensor, count: int) -> Tensor:
    out = model.generate(ids, mask, max_new_tokens=count, do_sample=False, eos_token_id=[])
    return out[:, ids.shape[1] :]


def eager_greedy(model: Any, ids: Tensor, mask: Tensor, count: int) -> Tensor:
    loop = Eager(model, mask)
    return torch.stack([loop.prefill(ids), *(loop.step() for _ in range(count - 1))], dim=1)


# Each check and its figures, in the order in which Text.figures and Text.varying return them.
LINES = {
    "KL(truth ‖ model), mean / max": (of.KL_MEAN, of.KL_MAX),
    "|Δ logit|, mean / max": (of.DELTA_MEAN, of.DELTA_MAX),
    of.TOP_1: (of.TOP_1,),
    of.PERPLEXITY: (of.PERPLEXITY,),
    "{tokens} greedy tokens: until they differ / gap": (of.ALIKE, of.GAP),
    f"batch {BATCH}: |Δ logit| / equal texts / gap": (of.BATCH_DELTA, of.BATCH_ALIKE, of.BATCH_GAP),
    f"{RUNS} runs: differing logits / texts": (of.LOGITS_VARY, of.TOKENS_VARY),
}


@torch.no_grad()
def check_model(
    checkpoint: Checkpoint, ids: Tensor, dtypes: Sequence[torch.dtype], tokens: int,
    truth: tuple[Truth, Any],
) -> Iterator[Finding]:  # fmt: skip
    """Yields the findings of each dtype.

    ids :: [1, t], on the device; tokens: number of new tokens; truth: the result of `truth_of`
    """
    source, exact = truth
    with full_precision():
        text = Text(exact, checkpoint.config.pad_token_id, ids, tokens)
        for dtype in dtypes:
            model = exact  # in float32, transformers' model is the truth itself
            if dtype != torch.float32:
                click.echo(f"{source.name}, {dtype}".replace("torch.", ""), err=True)
                model = source.load(dtype=dtype, device=ids.device)
            measured = text.figures(model, eager_greedy)
            eager = iter((*measured, None, None))
            half = dtype != torch.float32
            by_experts = measured[3] if checkpoint.config.num_experts and half else 0.0  # |Δ| max
            del model  # frees its memory before the next model is loaded
            click.echo(f"{OURS}, {dtype}".replace("torch.", ""), err=True)
            gemma = GemmaForCausalLM.from_checkpoint(checkpoint, dtype=dtype, device=ids.device)
            gemma.generation_config.clear()  # eager_greedy does not apply its options, either
            varying = text.varying(gemma)
            ours = iter((*text.figures(gemma, our_greedy), *varying))
            del gemma
            for check, names in LINES.items():
                pairs = {name: (next(ours), next(eager)) for name in names}
                yield finding(
                    MODEL, check.format(tokens=tokens), dtype, pairs, by_experts=by_experts
                )


class Text:
    """Measures how models differ from the truth on a text, ids :: [1, t].

    truth: a model in float32, called like the reference; pad: id for the places of padding
    """

    def __init__(self, truth: Any, pad: int, ids: Tensor, tokens: int) -> None:
        self.truth, self.pad, self.ids, self.tokens = truth, pad, ids, tokens
        self.logits = truth(ids, use_cache=False).logits[0]  # [t, vocab]

    def figures(self, model: Any, greedy: Greedy) -> Figures:
        """Returns all figures of LINES except those of the last line, which `varying` returns."""
        logits = model(self.ids, use_cache=False).logits[0]
        chosen = greedy(model, self.ids, torch.ones_like(self.ids), self.tokens)
        close = closeness(logits, self.logits, self.ids[0])
        return *close, *self.agreement(chosen), *self.batch(model, greedy)

    def agreement(self, chosen: Tensor) -> Figures:
        """Returns the number of new tokens before the first token that the truth would not choose,
        and the largest gap between the truth's best logit and a new token's logit.

        chosen :: [1, tokens]: the model's greedy tokens after the text
        """
        read = torch.cat((self.ids, chosen[:, :-1]), dim=1)
        truth = self.truth(read, use_cache=False, logits_to_keep=self.tokens).logits
        gaps = under_the_best(truth[0], chosen[0])
        return float((gaps == 0).cumprod(0).sum()), float(gaps.max())

    def batch(self, model: Any, greedy: Greedy) -> Figures:
        """Runs beginnings of the text as a left-padded batch, and decodes tokens after them.
        Compares logits and tokens with forward passes over each sequence alone. Returns |Δ logit|
        max, the number of sequences with equal greedy tokens, and the largest gap."""
        t = max(self.ids.shape[1] // 4, 2 * BATCH)
        lengths = [t * (row + 1) // BATCH for row in range(BATCH)]
        ids = torch.stack([self.ids[0, :t].roll(t - length) for length in lengths])
        mask = torch.stack([torch.arange(t, device=ids.device) >= t - n for n in lengths]).long()
        ids, keep = ids.masked_fill(mask == 0, self.pad), lengths[0]
        together = model(
            ids, attention_mask=mask, position_ids=positions(mask), use_cache=False,
            logits_to_keep=keep,
        ).logits  # fmt: skip
        texts = greedy(model, ids, mask, WRITTEN)
        deltas, gaps = [], []
        for row, length in enumerate(lengths):
            text = torch.cat((self.ids[:, :length], texts[row : row + 1, :-1]), dim=1)
            out = model(text, use_cache=False, logits_to_keep=keep + WRITTEN - 1)
            alone = out.logits[0].float()
            deltas.append((together[row].float() - alone[:keep]).abs().max())
            gaps.append(under_the_best(alone[keep - 1 :], texts[row]).max())
        gap = torch.stack(gaps)
        return float(torch.stack(deltas).max()), float((gap == 0).sum()), float(gap.max())

    def varying(self, model: GemmaForCausalLM) -> Figures:
        """Returns how many repeated runs gave logits that are not bitwise equal to the first run's,
        and how many gave other tokens than the first run."""
        mask = torch.ones_like(self.ids)
        logits = model(self.ids, use_cache=False).logits
        text = our_greedy(model, self.ids, mask, WRITTEN)
        again = [model(self.ids, use_cache=False).logits.equal(logits) for _ in range(RUNS - 1)]
        repeated = [our_greedy(model, self.ids, mask, WRITTEN).equal(text) for _ in range(RUNS - 1)]
        return again.count(False), repeated.count(False)


def closeness(logits: Tensor, truth: Tensor, ids: Tensor) -> Figures:
    """Compares logits with truth, both [t, vocab], for the text ids :: [t].

    Returns KL mean and max, |Δ logit| mean and max, top-1 agreement and perplexity change: the
    first six figures of LINES. Top-1 agreement counts tokens that are the truth's best, or tie with
    it in the dtype of logits.
    """
    columns = []
    for rows in torch.arange(len(ids), device=ids.device).split(CHUNK):
        ours, true = logits[rows].double(), truth[rows].double()
        delta, shift = ours - true, ours.logsumexp(-1) - true.logsumexp(-1)
        kl = shift - (true.softmax(-1) * delta).sum(-1)
        target = ids.roll(-1)[rows, None]
        surprise = shift - delta.gather(1, target)[:, 0]  # loss minus the truth's loss
        best, choice = true.amax(-1), ours.argmax(-1, keepdim=True)
        # Rounding two exact logits to their dtype can swap them if they differ by this much.
        tie = torch.finfo(logits.dtype).eps * best.abs()
        alike = (best - true.gather(1, choice)[:, 0] <= tie).double()
        delta = delta.abs()
        columns.append(torch.stack((kl, delta.mean(-1), delta.amax(-1), alike, surprise)))
    kl, mean, largest, alike, surprise = torch.cat(columns, dim=1)
    return (
        *(float(x) for x in (kl.mean(), kl.max(), mean.mean(), largest.max(), alike.mean())),
        float(surprise[:-1].mean().expm1()),
    )
