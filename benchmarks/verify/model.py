"""The model in a dtype, beside its rival in that dtype, both before the reference in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_fast.benchmarks.measure.machine import installed_version
from gemma_fast.benchmarks.model.judge import full_precision
from gemma_fast.benchmarks.verify import certificate as of
from gemma_fast.benchmarks.verify.certificate import MODEL, Line, line
from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.checkpoint.base import Checkpoint
from gemma_fast.checkpoint.random import RandomCheckpoint
from gemma_fast.load import refuse_overflow
from gemma_fast.memory import free_bytes
from gemma_fast.reference import Reference
from gemma_fast.text.tokenizer import Tokenizer

RUNS, BATCH = 3, 8
NEW = 16  # tokens written to each text of a batch, and in a repeated run
CHUNK = 16  # rows of logits in float64
OLDEST = 5, 17  # of transformers, that is compared with
# Charles Darwin, On the Origin of Species (1859), introduction. Longer than a window of 512 tokens.
TEXT = """\
When on board H.M.S. 'Beagle,' as naturalist, I was much struck with certain facts in the \
distribution of the inhabitants of South America, and in the geological relations of the present \
to the past inhabitants of that continent. These facts seemed to me to throw some light on the \
origin of species—that mystery of mysteries, as it has been called by one of our greatest \
philosophers. On my return home, it occurred to me, in 1837, that something might perhaps be made \
out on this question by patiently accumulating and reflecting on all sorts of facts which could \
possibly have any bearing on it. After five years' work I allowed myself to speculate on the \
subject, and drew up some short notes; these I enlarged in 1844 into a sketch of the conclusions, \
which then seemed to me probable: from that period to the present day I have steadily pursued the \
same object. I hope that I may be excused for entering on these personal details, as I give them \
to show that I have not been hasty in coming to a decision.

My work is now nearly finished; but as it will take me two or three more years to complete it, and \
as my health is far from strong, I have been urged to publish this Abstract. I have more \
especially been induced to do this, as Mr. Wallace, who is now studying the natural history of the \
Malay archipelago, has arrived at almost exactly the same general conclusions that I have on the \
origin of species. Last year he sent to me a memoir on this subject, with a request that I would \
forward it to Sir Charles Lyell, who sent it to the Linnean Society, and it is published in the \
third volume of the Journal of that Society. Sir C. Lyell and Dr. Hooker, who both knew of my \
work—the latter having read my sketch of 1844—honoured me by thinking it advisable to publish, \
with Mr. Wallace's excellent memoir, some brief extracts from my manuscripts.

This Abstract, which I now publish, must necessarily be imperfect. I cannot here give references \
and authorities for my several statements; and I must trust to the reader reposing some confidence \
in my accuracy. No doubt errors will have crept in, though I hope I have always been cautious in \
trusting to good authorities alone. I can here give only the general conclusions at which I have \
arrived, with a few facts in illustration, but which, I hope, in most cases will suffice. No one \
can feel more sensible than I do of the necessity of hereafter publishing in detail all the facts, \
with references, on which my conclusions have been grounded; and I hope in a future work to do \
this."""

Figures = tuple[float, ...]
Load = Callable[..., Any]  # checkpoint, dtype=…, device=… → model
Greedy = Callable[[Any, Tensor, Tensor, int], Tensor]  # model, ids, mask, count → [b, count]


def text_ids(checkpoint: Checkpoint, tokens: int) -> Tensor:
    """[1, t]: TEXT, or for random weights random ids; what leaves room for so many tokens more."""
    config = checkpoint.config
    room = config.max_position_embeddings - max(tokens, NEW)
    if room < 2 * BATCH:
        raise ValueError(f"{tokens=} leaves no room for a prompt in a context of {room + tokens}")
    if isinstance(checkpoint, RandomCheckpoint):
        generator = torch.Generator().manual_seed(0)
        return torch.randint(3, config.vocab_size, (1, min(room, 600)), generator=generator)
    return Tokenizer.from_pretrained(checkpoint.path)(TEXT, return_tensors="pt").input_ids[:, :room]


def dtypes_of(checkpoint: Checkpoint, device: torch.device, asked: str) -> list[torch.dtype]:
    """The one asked for (ValueError: this model overflows it), or all that the device is for; on a
    GPU float32 only where the reference and another model as large fit."""
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


class Subject(NamedTuple):
    """Whose model, how it is loaded, and how it writes; the reference's ways of calling it."""

    name: str
    load: Load
    greedy: Greedy


def rival() -> Subject:
    """transformers, or where it is missing or old this project's reference."""
    version = installed_version("transformers")
    if version is None or tuple(map(int, version.split(".")[:2])) < OLDEST:
        found = "is not installed" if version is None else f"is {version}, older than 5.17"
        return Subject(
            f"eager reference, as transformers {found}", Reference.from_checkpoint, eager_greedy
        )
    return Subject(f"transformers {version}", load_transformers, eager_greedy)


def load_transformers(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Any:
    from gemma_fast.benchmarks.model.transformers_model import transformers_model

    return transformers_model(checkpoint, "eager", dtype, device)


def our_greedy(model: GemmaForCausalLM, ids: Tensor, mask: Tensor, count: int) -> Tensor:
    out = model.generate(
        ids, mask, max_new_tokens=count, do_sample=False, repetition_penalty=1.0, eos_token_id=[]
    )
    return out[:, ids.shape[1] :]


def eager_greedy(model: Any, ids: Tensor, mask: Tensor, count: int) -> Tensor:
    past, chosen = None, []
    for _ in range(count):
        out = model(
            ids, attention_mask=mask, position_ids=positions(mask)[:, -ids.shape[1] :],
            past_key_values=past, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        past, ids = out.past_key_values, out.logits.argmax(-1)
        mask = F.pad(mask, (0, 1), value=1)
        chosen.append(ids)
    return torch.cat(chosen, dim=1)


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


OURS = Subject("gemma_fast", GemmaForCausalLM.from_checkpoint, our_greedy)
# What is looked at, and its figures, in the order in which they are found.
CHECKS = {
    "KL(reference ‖ model), mean / max": (of.KL_MEAN, of.KL_MAX),
    "|Δ logit|, mean / max": (of.DELTA_MEAN, of.DELTA_MAX),
    of.TOP_1: (of.TOP_1,),
    of.PERPLEXITY: (of.PERPLEXITY,),
    "{tokens} greedy tokens: until they part / gap": (of.ALIKE, of.GAP),
    f"batch {BATCH}: |Δ logit| / texts alike / gap": (of.BATCH_DELTA, of.BATCH_ALIKE, of.BATCH_GAP),
    f"{RUNS} runs: differing logits / texts": (of.LOGITS_VARY, of.TOKENS_VARY),
}


@torch.no_grad()
def check_model(
    checkpoint: Checkpoint, ids: Tensor, dtypes: Sequence[torch.dtype], tokens: int, other: Subject
) -> Iterator[Line]:
    """ids :: [1, t], a text, on the device; tokens: how many are written after it."""
    with full_precision():
        judge = Judge(checkpoint, ids, tokens)
        for dtype in dtypes:
            found = []
            for subject in (other, OURS):
                click.echo(f"{subject.name}, {dtype}".replace("torch.", ""), err=True)
                model = subject.load(checkpoint, dtype=dtype, device=ids.device)
                varying = judge.varying(model) if subject is OURS else (None, None)
                found.append((*judge.figures(model, subject.greedy), *varying))
                del model  # its memory first
            eager, ours = map(iter, found)
            for check, names in CHECKS.items():
                pairs = {name: (next(ours), next(eager)) for name in names}
                yield line(MODEL, check.format(tokens=tokens), dtype, pairs)


class Judge:
    """The reference in float32, and what it says of a text: ids :: [1, t]."""

    def __init__(self, checkpoint: Checkpoint, ids: Tensor, tokens: int) -> None:
        self.reference = Reference.from_checkpoint(
            checkpoint, dtype=torch.float32, device=ids.device
        )
        self.pad, self.ids, self.tokens = checkpoint.config.pad_token_id, ids, tokens
        self.truth = self.reference(ids, use_cache=False).logits[0]  # [t, vocab]

    def figures(self, model: Any, greedy: Greedy) -> Figures:
        logits = model(self.ids, use_cache=False).logits[0]
        chosen = greedy(model, self.ids, torch.ones_like(self.ids), self.tokens)
        close = closeness(logits, self.truth, self.ids[0])
        return *close, *self.agreement(chosen), *self.batch(model, greedy)

    def agreement(self, chosen: Tensor) -> Figures:
        """Tokens until the first that is not the reference's, had it read the ones before; and of
        all of them, how far one's logit lies under the reference's best."""
        read = torch.cat((self.ids, chosen[:, :-1]), dim=1)
        truth = self.reference(read, use_cache=False, logits_to_keep=self.tokens).logits
        gaps = under_the_best(truth[0], chosen[0])
        return float((gaps == 0).cumprod(0).sum()), float(gaps.max())

    def batch(self, model: Any, greedy: Greedy) -> Figures:
        """Beginnings of the text, padded on the left, and what it writes after them; beside what
        it makes of each of these texts alone, read at once."""
        t = max(self.ids.shape[1] // 4, 2 * BATCH)
        lengths = [t * (row + 1) // BATCH for row in range(BATCH)]
        ids = torch.stack([self.ids[0, :t].roll(t - length) for length in lengths])
        mask = torch.stack([torch.arange(t, device=ids.device) >= t - n for n in lengths]).long()
        ids, keep = ids.masked_fill(mask == 0, self.pad), lengths[0]
        together = model(
            ids, attention_mask=mask, position_ids=positions(mask), use_cache=False,
            logits_to_keep=keep,
        ).logits  # fmt: skip
        texts = greedy(model, ids, mask, NEW)
        deltas, gaps = [], []
        for row, length in enumerate(lengths):
            text = torch.cat((self.ids[:, :length], texts[row : row + 1, :-1]), dim=1)
            alone = model(text, use_cache=False, logits_to_keep=keep + NEW - 1).logits[0].float()
            deltas.append((together[row].float() - alone[:keep]).abs().max())
            gaps.append(under_the_best(alone[keep - 1 :], texts[row]).max())
        gap = torch.stack(gaps)
        return float(torch.stack(deltas).max()), float((gap == 0).sum()), float(gap.max())

    def varying(self, model: GemmaForCausalLM) -> Figures:
        """How many of the runs after the first gave other logits, to the bit, and another text."""
        mask = torch.ones_like(self.ids)
        logits = model(self.ids, use_cache=False).logits
        text = our_greedy(model, self.ids, mask, NEW)
        again = [model(self.ids, use_cache=False).logits.equal(logits) for _ in range(RUNS - 1)]
        repeated = [our_greedy(model, self.ids, mask, NEW).equal(text) for _ in range(RUNS - 1)]
        return again.count(False), repeated.count(False)


def under_the_best(logits: Tensor, tokens: Tensor) -> Tensor:
    """logits :: [t, vocab], tokens :: [t] → [t], how far a token's logit lies under the largest"""
    return logits.amax(-1) - logits.gather(-1, tokens[:, None])[:, 0]


def closeness(logits: Tensor, truth: Tensor, ids: Tensor) -> Figures:
    """logits, truth :: [t, vocab], after each of ids :: [t] → the first six figures of CHECKS"""
    columns = []
    for rows in torch.arange(len(ids), device=ids.device).split(CHUNK):
        ours, true = logits[rows].double(), truth[rows].double()
        delta, shift = ours - true, ours.logsumexp(-1) - true.logsumexp(-1)
        kl = shift - (true.softmax(-1) * delta).sum(-1)
        target = ids.roll(-1)[rows, None]
        surprise = shift - delta.gather(1, target)[:, 0]  # more than the reference's
        alike = (ours.argmax(-1) == true.argmax(-1)).double()
        delta = delta.abs()
        columns.append(torch.stack((kl, delta.mean(-1), delta.amax(-1), alike, surprise)))
    kl, mean, largest, alike, surprise = torch.cat(columns, dim=1)
    return (
        *(float(x) for x in (kl.mean(), kl.max(), mean.mean(), largest.max(), alike.mean())),
        float(surprise[:-1].mean().expm1()),
    )
