"""Checks a provider against the reference in float32, before the provider is timed.

The check compares greedy tokens and logits. The logits depend on the KV cache that the provider
wrote. If the context allows, the cache is at least as full as in the benchmark case.

A trial is the provider's part of the check, on random prompts. The provider prefills a prefix (as
many tokens as the case's depth or prompt), prefills the rest of the prompt, decodes greedily, and
reads a few random tokens, the probe. The judge compares the results with those of the reference,
which reads the same tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gemma_fast.benchmarks.measure.outcome import (
    LLAMA_CPP,
    OURS,
    Wrong,
    error,
    full_precision,
)
from gemma_fast.benchmarks.model.cases import PROMPT, Case, is_packed
from gemma_fast.benchmarks.model.providers import Provider
from gemma_fast.checkpoint.base import Checkpoint
from gemma_fast.memory import free_bytes
from gemma_fast.reference import Reference

# TOKENS: number of prompt tokens after the prefix or the window, whichever is longer. STEPS: number
# of decode steps. PROBE: number of tokens in the probe.
TOKENS, STEPS, PROBE = 24, 16, 8
LONG = 1024  # the trial's prompt is longer than the windows; windows above LONG are ignored
ROWS = 4  # up to this batch size all sequences are checked, otherwise the first and the last
CHUNK = 1024  # tokens of a prefix that the reference reads in one forward pass
# Limits of the logits' error and of the regret (see Judge). For comparison: a model without rotary
# embedding has an error of 0.46; rounding to bf16 alone gives 0.012 to 0.025 with Gemma 3 270M, and
# 0.016 with random weights.
TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 1e-4}
# llama.cpp rounds activations to 8 bits: 0.10 with Gemma 3 270M (Q4_K_M) and random ids. On a text,
# its perplexity differs by 0.7 % from that of the unpacked weights.
OWN_TOLERANCE = {LLAMA_CPP: 0.2}
# Our error may be SLACK times transformers' largest error, because rounding alone can make the
# errors of correct results differ by this factor.
SLACK = 1.25
# The same with packed weights, whose rounding to 16 bits is ours and not transformers'. It changes
# the error of the few tokens of a probe by a factor of 2.2 (Gemma 3 270M), but not that of a text.
PACKED_SLACK = 3.0

Past = list[tuple[Tensor, Tensor]]  # K and V of each layer


class Trial(NamedTuple):
    ids: Tensor  # [b, Judge.room]: all tokens that the provider read: prompt, greedy tokens, probe
    tokens: Tensor  # [b, STEPS + 1]: greedy tokens
    logits: Tensor  # [b, PROBE, vocab]: logits of the probe


class Judge:
    """Checks providers against the reference, whose weights are rounded to `dtype`. They are not
    rounded if the checkpoint is packed, or if there are `more` dtypes.

    The reference computes in float32 if that fits in memory. A model with random weights mostly
    repeats the previous token, whatever attention computes, so correct greedy tokens prove little.
    Thus the probe's logits are compared: they depend on all K and V that the decode steps wrote.

    error: outcome.error of the probe's logits
    regret: the mean difference between the reference's largest logit and its logit of the
    provider's greedy token, in standard deviations of the reference's logits at this position
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, *more: torch.dtype
    ) -> None:
        config = checkpoint.config
        self.dtype, self.device, self.vocab_size = dtype, device, config.vocab_size
        self.dtypes = dtype, *more
        # Bytes of the reference's float32 weights, and of the provider's weights and activations.
        needed = config.num_parameters * (4 + 1.5 * dtype.itemsize)
        self.exact = dtype == torch.float32 or needed < free_bytes(device)
        packed = is_packed(checkpoint)
        self.slack = PACKED_SLACK if packed else SLACK
        kept = torch.float32 if self.exact and (packed or more) else dtype
        self.reference = Reference.from_checkpoint(checkpoint, dtype=kept, device=device)
        if self.exact:
            for name, weight in self.reference.weights.items():
                self.reference.weights[name] = weight.float()
        windows = [config.window(i) or 0 for i in range(config.num_hidden_layers)]
        self.window = max((w for w in windows if w <= LONG), default=0)
        self.context = config.max_position_embeddings
        # Errors of transformers, by dtype, batch size and length of the prefix.
        self.errors: dict[tuple[torch.dtype, int, int], list[float]] = {}
        self.compared = False  # whether our error was compared to transformers'
        # The reference's caches by sequence and prefix length, on the host because they are large.
        self.pasts: dict[tuple[int, int], Past] = {}

    @property
    def about(self) -> str:
        kind = "float32" if self.exact else f"{self.dtype}, as float32 does not fit".split(".")[1]
        text = f"Checked against the reference in {kind}."
        if {*self.dtypes} == {torch.float32}:
            return text
        return f"{text} {OURS}'s error was {'not ' * (not self.compared)}compared to transformers'."

    def prefix(self, case: Case) -> int:
        """Returns the length of the prefix: the depth or the timed prompt's length, whichever is
        larger, but short enough that the trial fits the context."""
        reach = max(case.depth, case.tokens if case.kind == PROMPT else 0)
        return max(min(reach, self.context - TOKENS - STEPS - PROBE), 0)

    def room(self, case: Case) -> int:
        """Returns the number of tokens that the provider reads in a trial."""
        return max(self.prefix(case), self.window) + TOKENS + STEPS + PROBE

    def check(
        self, name: str, provider: Provider, case: Case, dtype: torch.dtype | None = None
    ) -> float:
        """Runs a trial and returns the error of the provider's logits.

        dtype: of the provider's logits, which sets the limits; None: the judge's
        Raises Wrong if the logits or the greedy tokens are wrong. Exceptions of the provider are
        not caught.
        """
        prefix = self.prefix(case)
        dtype = dtype or self.dtype
        if dtype == torch.float32 and not self.exact:
            raise NotImplementedError("not enough memory for the reference in float32")
        trial = try_out(provider, self._ids(case.batch, self.room(case) - STEPS), prefix)
        if trial.logits.dtype != dtype:
            raise Wrong(f"logits are {trial.logits.dtype}, not {dtype}")
        try:
            found, regret = self.judge(trial, prefix)
        except torch.OutOfMemoryError as problem:
            raise NotImplementedError("not enough memory for the reference") from problem
        limit = OWN_TOLERANCE.get(name, TOLERANCE[dtype])
        if not found <= limit:
            raise Wrong(f"error {found:.2g} exceeds the limit {limit:g}")
        if dtype == torch.float32 and regret:
            raise Wrong("greedy tokens differ from the reference's")
        if not regret <= limit:
            raise Wrong(f"greedy tokens are {regret:.2g} sd below the best logit, limit {limit:g}")
        if dtype != torch.float32:
            self.compare(name, found, self.errors.setdefault((dtype, case.batch, prefix), []))
        return found

    def compare(self, name: str, found: float, rivals: list[float]) -> None:
        """Records transformers' error in `rivals`, which are of one 16-bit dtype. Raises Wrong if
        our error exceeds `slack` times their largest error, plus 1e-3. Our error is compared only
        if the reference is in float32."""
        if name.startswith("transformers"):
            rivals.append(found)
        if name == OURS and self.exact and rivals:
            self.compared = True
            if found > self.slack * max(rivals) + 1e-3:
                raise Wrong(f"error {found:.2g}; transformers' is {max(rivals):.2g}")

    def judge(self, trial: Trial, prefix: int) -> tuple[float, float]:
        """Returns error and regret. The reference reads one sequence at a time, because logits and
        caches are large."""
        batch = len(trial.ids)
        rows = [*range(batch)] if batch <= ROWS else [0, batch - 1]
        with full_precision():
            truth = torch.cat([self._truth(trial.ids[[row]], row, prefix) for row in rows])
        chosen = truth[:, : STEPS + 1]
        # The last greedy token was not read: the probe's tokens were read instead.
        found = error(trial.logits[rows], truth[:, STEPS + 1 :])
        gaps = under_the_best(chosen, trial.tokens[rows])
        return found, float((gaps / chosen.std(-1)).mean())

    def _truth(self, ids: Tensor, row: int, prefix: int) -> Tensor:
        """Returns the reference's logits of the greedy tokens and the probe.

        The shape is [1, STEPS + 1 + PROBE, vocab].
        """
        past = self._past(ids[:, :prefix], row) if prefix else None
        keep = STEPS + 1 + PROBE
        out = self.reference(ids[:, prefix:], past_key_values=past, logits_to_keep=keep)
        return out.logits.float()

    def _past(self, ids: Tensor, row: int) -> Past:
        """Returns the reference's cache of a prefix, ids :: [1, prefix]. Computes it once for all
        providers. row: index of the sequence"""
        key = row, ids.shape[1]
        if key not in self.pasts:
            past = None
            for chunk in ids.split(CHUNK, dim=1):
                past = self.reference(chunk, past_key_values=past, logits_to_keep=1).past_key_values
            self.pasts[key] = [(k.cpu(), v.cpu()) for k, v in past or []]
        return [(k.to(self.device), v.to(self.device)) for k, v in self.pasts[key]]

    def _ids(self, batch: int, length: int) -> Tensor:
        """Returns random ids :: [batch, length]. Row i is the same for every batch size."""
        generators = [torch.Generator().manual_seed(row) for row in range(batch)]
        rows = [torch.randint(3, self.vocab_size, (length,), generator=g) for g in generators]
        return torch.stack(rows).to(self.device)


def try_out(provider: Provider, ids: Tensor, prefix: int) -> Trial:
    """Runs a trial. ids :: [b, prompt + PROBE]: the prompt and the probe

    Prefills the prompt in two parts, decodes greedily, then computes the probe's logits.
    """
    prompt = ids.shape[1] - PROBE
    first = prefix or prompt - prompt // 3
    provider.prefill(ids[:, :first])
    tokens = [provider.extend(ids[:, first:prompt]).clone()]
    tokens += [provider.step().clone() for _ in range(STEPS)]
    probe = ids[:, prompt:]
    chosen = torch.stack(tokens, dim=1)
    if int(chosen.min()) < 0:  # gemma_fast returns -1 if logits are not finite
        raise Wrong("logits are not finite")
    read = torch.cat((ids[:, :prompt], chosen[:, :-1], probe), dim=1)
    return Trial(read, chosen, provider.logits(probe))


def under_the_best(logits: Tensor, tokens: Tensor) -> Tensor:
    """Returns the largest logit minus the token's logit :: […].

    logits :: […, vocab], tokens :: […]
    """
    return logits.amax(-1) - logits.gather(-1, tokens[..., None])[..., 0]
