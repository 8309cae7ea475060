"""Checks a provider against the reference in float32, before the provider is timed.

The check compares greedy tokens, and logits that depend on the KV cache that the provider wrote.
The cache is at least as full as in the benchmark case, if the context allows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gemma_fast.benchmarks.measure.outcome import OURS, Wrong, error, full_precision
from gemma_fast.benchmarks.model.cases import PROMPT, Case
from gemma_fast.benchmarks.model.providers import Provider
from gemma_fast.checkpoint.base import Checkpoint
from gemma_fast.memory import free_bytes
from gemma_fast.reference import Reference

TOKENS, STEPS, PROBE = 24, 16, 8  # prefilled after prefix or window; decoded; read after those
LONG = 1024  # the prompt is longer than any window up to this size
ROWS = 4  # batches up to this are checked in full, larger ones by their first and last row
CHUNK = 1024  # tokens of a prefix that the reference reads at once
# Limits of the logits' error (see outcome.error) and of the regret. Without rotary embedding the
# error is 0.46; rounding to bf16 gives 0.012 to 0.025 with Gemma 3 270M, 0.016 with random weights.
TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 1e-4}
SLACK = 1.25  # limit: SLACK times transformers' largest error; two correct roundings differ as much

Past = list[tuple[Tensor, Tensor]]  # K and V of each layer


class Trial(NamedTuple):
    ids: Tensor  # [b, prefix + … + steps + probe]: all tokens read, with the greedy ones
    tokens: Tensor  # [b, steps + 1]: greedy tokens
    logits: Tensor  # [b, probe, vocab], computed from the cache that the steps wrote


class Judge:
    """Checks providers against the reference, whose weights are rounded to `dtype`.

    The reference computes in float32 if that fits in memory. A model with random weights mostly
    repeats the previous token, whatever attention computes. So the check reads PROBE more tokens
    after the decoded ones; their logits show what the steps wrote to the cache. error: the error of
    those logits. regret: the mean gap between the largest logit and the chosen token's, in standard
    deviations of a row of logits.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        config = checkpoint.config
        self.dtype, self.device, self.vocab_size = dtype, device, config.vocab_size
        # Bytes of the reference's float32 weights, and of the provider's weights and activations.
        needed = config.num_parameters * (4 + 1.5 * dtype.itemsize)
        self.exact = dtype == torch.float32 or needed < free_bytes(device)
        self.reference = Reference.from_checkpoint(checkpoint, dtype=dtype, device=device)
        if self.exact:
            for name, weight in self.reference.weights.items():
                self.reference.weights[name] = weight.float()
        windows = [config.window(i) or 0 for i in range(config.num_hidden_layers)]
        self.window = max((w for w in windows if w <= LONG), default=0)
        self.context = config.max_position_embeddings
        self.errors: dict[tuple[int, int], list[float]] = {}  # of transformers, by batch and prefix
        self.compared = False
        self.pasts: dict[tuple[int, int], Past] = {}  # by row and prefix; large, so on the host

    @property
    def about(self) -> str:
        kind = "float32" if self.exact else f"{self.dtype}, as float32 does not fit".split(".")[1]
        text = f"Checked against the reference in {kind}."
        if self.dtype == torch.float32:
            return text
        return f"{text} {OURS}'s error was {'not ' * (not self.compared)}compared to transformers'."

    def prefix(self, case: Case) -> int:
        """Returns the number of tokens before the trial: the depth or the timed prompt's length."""
        reach = max(case.depth, case.tokens if case.kind == PROMPT else 0)
        return max(min(reach, self.context - TOKENS - STEPS - PROBE), 0)

    def room(self, case: Case) -> int:
        return max(self.prefix(case), self.window) + TOKENS + STEPS + PROBE

    def check(self, name: str, provider: Provider, case: Case) -> float:
        """Returns the error of its logits. Raises Wrong, or what the provider raises."""
        prefix = self.prefix(case)
        trial = try_out(provider, self._ids(case.batch, self.room(case) - STEPS), prefix)
        if trial.logits.dtype != self.dtype:
            raise Wrong(f"logits are {trial.logits.dtype}, not {self.dtype}")
        try:
            found, regret = self.judge(trial, prefix)
        except torch.OutOfMemoryError as problem:
            raise NotImplementedError("not enough memory for the reference") from problem
        limit = TOLERANCE[self.dtype]
        if not found <= limit:
            raise Wrong(f"error {found:.2g} exceeds the limit {limit:g}")
        if self.dtype == torch.float32 and regret:
            raise Wrong("its greedy tokens differ from the reference's")
        if not regret <= limit:
            raise Wrong(f"its tokens are {regret:.2g} sd below the best logit, more than {limit:g}")
        self.compare(name, found, self.errors.setdefault((case.batch, prefix), []))
        return found

    def compare(self, name: str, found: float, rivals: list[float]) -> None:
        """Raises Wrong if, in 16 bits, this project's error exceeds transformers' by the slack."""
        if name.startswith("transformers"):
            rivals.append(found)
        if name == OURS and self.exact and self.dtype != torch.float32 and rivals:
            self.compared = True
            if found > SLACK * max(rivals) + 1e-3:
                raise Wrong(f"error {found:.2g}; transformers' is {max(rivals):.2g}")

    def judge(self, trial: Trial, prefix: int) -> tuple[float, float]:
        """Returns error and regret. One sequence at a time, because logits and caches are large."""
        batch = len(trial.ids)
        rows = [*range(batch)] if batch <= ROWS else [0, batch - 1]
        with full_precision():
            truth = torch.cat([self._truth(trial.ids[[row]], row, prefix) for row in rows])
        chosen = truth[:, : STEPS + 1]
        # The trial read the probe's first token instead of the newest greedy token.
        found = error(trial.logits[rows], truth[:, STEPS + 1 :])
        gaps = under_the_best(chosen, trial.tokens[rows])
        return found, float((gaps / chosen.std(-1)).mean())

    def _truth(self, ids: Tensor, row: int, prefix: int) -> Tensor:
        """Returns reference logits from the first greedy token on: [1, steps + 1 + probe, vocab]"""
        past = self._past(ids[:, :prefix], row) if prefix else None
        keep = STEPS + 1 + PROBE
        out = self.reference(ids[:, prefix:], past_key_values=past, logits_to_keep=keep)
        return out.logits.float()

    def _past(self, ids: Tensor, row: int) -> Past:
        """Returns the reference's cache of a row's prefix, computed once for all providers."""
        key = row, ids.shape[1]
        if key not in self.pasts:
            past = None
            for chunk in ids.split(CHUNK, dim=1):
                past = self.reference(chunk, past_key_values=past, logits_to_keep=1).past_key_values
            self.pasts[key] = [(k.cpu(), v.cpu()) for k, v in past or []]
        return [(k.to(self.device), v.to(self.device)) for k, v in self.pasts[key]]

    def _ids(self, batch: int, length: int) -> Tensor:
        """Returns random ids [batch, length]. A row is the same in every batch size."""
        generators = [torch.Generator().manual_seed(row) for row in range(batch)]
        rows = [torch.randint(3, self.vocab_size, (length,), generator=g) for g in generators]
        return torch.stack(rows).to(self.device)


def try_out(provider: Provider, ids: Tensor, prefix: int) -> Trial:
    """Prefills a prompt in two parts, decodes greedily, then computes the probe's logits."""
    prompt = ids.shape[1] - PROBE
    first = prefix or prompt - prompt // 3
    provider.prefill(ids[:, :first])
    tokens = [provider.extend(ids[:, first:prompt]).clone()]
    tokens += [provider.step().clone() for _ in range(STEPS)]
    probe = ids[:, prompt:]
    chosen = torch.stack(tokens, dim=1)
    if int(chosen.min()) < 0:  # gemma_fast returns -1 if logits are not finite
        raise Wrong("its logits are not finite")
    read = torch.cat((ids[:, :prompt], chosen[:, :-1], probe), dim=1)
    return Trial(read, chosen, provider.logits(probe))


def under_the_best(logits: Tensor, tokens: Tensor) -> Tensor:
    """Returns the largest logit minus the token's: logits :: […, vocab], tokens :: […] → […]"""
    return logits.amax(-1) - logits.gather(-1, tokens[..., None])[..., 0]
