"""The judge of models: the reference in float32. For the race it checks a provider's greedy tokens,
and the cache that it fills on the way, after as many tokens as the test has."""

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

TOKENS, STEPS, PROBE = 24, 16, 8  # read after prefix or window; decoded; read after those
LONG = 1024  # windows up to this are passed by the prompt
ROWS = 4  # that are judged; of more sequences the first and the last
CHUNK = 1024  # of a prefix, which the reference reads
# Limits of the logits' error (see outcome.error) and of the regret. Without rotary embedding the
# error is 0.46; rounding to bf16 gives 0.012 to 0.025 with Gemma 3 270M, 0.016 with random weights.
TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 1e-4}
SLACK = 1.25  # times transformers' largest error: two roundings of one model differ by as much

Past = list[tuple[Tensor, Tensor]]  # K and V of each layer


class Trial(NamedTuple):
    ids: Tensor  # [b, prefix + … + steps + probe]: what was read, greedy tokens between
    tokens: Tensor  # [b, steps + 1]: what was chosen
    logits: Tensor  # [b, probe, vocab], read from the cache that the steps wrote


class Judge:
    """The reference over a checkpoint's weights, as they are in `dtype`, but computing in float32.

    What random weights choose is mostly the token before, whatever attention does; so the check
    reads a few more tokens after the decoded ones, whose logits tell what the steps wrote to the
    cache. error: of those logits; regret: how far, in standard deviations of a row of logits, what
    was chosen lies under the best, on average.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        config = checkpoint.config
        self.dtype, self.device, self.vocab_size = dtype, device, config.vocab_size
        # Weights of this judge, and of the provider beside it with room to work.
        needed = config.num_parameters * (4 + 1.5 * dtype.itemsize)
        self.exact = dtype == torch.float32 or needed < free_bytes(device)
        self.reference = Reference.from_checkpoint(checkpoint, dtype=dtype, device=device)
        if self.exact:
            for name, weight in self.reference.weights.items():
                self.reference.weights[name] = weight.float()
        windows = [config.window(i) or 0 for i in range(config.num_hidden_layers)]
        self.window = max((w for w in windows if w <= LONG), default=0)
        self.context = config.max_position_embeddings
        self.errors: dict[tuple[int, int], list[float]] = {}  # transformers', by batch and prefix
        self.compared = False
        self.pasts: dict[tuple[int, int], Past] = {}  # by row and prefix; on the host, being large

    @property
    def about(self) -> str:
        kind = "float32" if self.exact else f"{self.dtype}, as float32 does not fit".split(".")[1]
        text = f"Checked against the reference in {kind}."
        if self.dtype == torch.float32:
            return text
        return f"{text} {OURS}'s error was {'not ' * (not self.compared)}compared to transformers'."

    def prefix(self, case: Case) -> int:
        """Tokens read before the trial: the depth, or a prompt as long as the one to be timed."""
        reach = max(case.depth, case.tokens if case.kind == PROMPT else 0)
        return max(min(reach, self.context - TOKENS - STEPS - PROBE), 0)

    def room(self, case: Case) -> int:
        return max(self.prefix(case), self.window) + TOKENS + STEPS + PROBE

    def check(self, name: str, provider: Provider, case: Case) -> float:
        """The error of its logits. Raises Wrong, or what the provider raises."""
        prefix = self.prefix(case)
        trial = try_out(provider, self._ids(case.batch, self.room(case) - STEPS), prefix)
        if trial.logits.dtype != self.dtype:
            raise Wrong(f"logits are {trial.logits.dtype}, not {self.dtype}")
        try:
            found, regret = self.judge(trial, prefix)
        except torch.OutOfMemoryError as problem:
            raise NotImplementedError("no memory for the reference that judges") from problem
        limit = TOLERANCE[self.dtype]
        if not found <= limit:
            raise Wrong(f"error {found:.2g}, more than {limit:g}")
        if self.dtype == torch.float32 and regret:
            raise Wrong("its greedy tokens are not the reference's")
        if not regret <= limit:
            raise Wrong(f"chooses tokens {regret:.2g} under the best, more than {limit:g}")
        self.compare(name, found, self.errors.setdefault((case.batch, prefix), []))
        return found

    def compare(self, name: str, found: float, rivals: list[float]) -> None:
        """Raises Wrong if, in 16 bits, this project is further off than transformers."""
        if name.startswith("transformers"):
            rivals.append(found)
        if name == OURS and self.exact and self.dtype != torch.float32 and rivals:
            self.compared = True
            if found > SLACK * max(rivals) + 1e-3:
                raise Wrong(f"error {found:.2g}; transformers' is {max(rivals):.2g}")

    def judge(self, trial: Trial, prefix: int) -> tuple[float, float]:
        """Error and regret; a sequence at a time, as logits and caches are large."""
        batch = len(trial.ids)
        rows = [*range(batch)] if batch <= ROWS else [0, batch - 1]
        with full_precision():
            truth = torch.cat([self._truth(trial.ids[[row]], row, prefix) for row in rows])
        chosen = truth[:, : STEPS + 1]
        # The probe's first token stands in place of the newest one.
        found = error(trial.logits[rows], truth[:, STEPS + 1 :])
        gaps = under_the_best(chosen, trial.tokens[rows])
        return found, float((gaps / chosen.std(-1)).mean())

    def _truth(self, ids: Tensor, row: int, prefix: int) -> Tensor:
        """The reference's logits from the first choice on: [1, steps + 1 + probe, vocab]."""
        past = self._past(ids[:, :prefix], row) if prefix else None
        keep = STEPS + 1 + PROBE
        out = self.reference(ids[:, prefix:], past_key_values=past, logits_to_keep=keep)
        return out.logits.float()

    def _past(self, ids: Tensor, row: int) -> Past:
        """The reference's cache of a row's prefix, computed once for all providers."""
        key = row, ids.shape[1]
        if key not in self.pasts:
            past = None
            for chunk in ids.split(CHUNK, dim=1):
                past = self.reference(chunk, past_key_values=past, logits_to_keep=1).past_key_values
            self.pasts[key] = [(k.cpu(), v.cpu()) for k, v in past or []]
        return [(k.to(self.device), v.to(self.device)) for k, v in self.pasts[key]]

    def _ids(self, batch: int, length: int) -> Tensor:
        """[batch, length]; a row is the same in every batch."""
        generators = [torch.Generator().manual_seed(row) for row in range(batch)]
        rows = [torch.randint(3, self.vocab_size, (length,), generator=g) for g in generators]
        return torch.stack(rows).to(self.device)


def try_out(provider: Provider, ids: Tensor, prefix: int) -> Trial:
    """A prompt in two parts, greedy steps after it, and the logits of a few tokens after those."""
    prompt = ids.shape[1] - PROBE
    first = prefix or prompt - prompt // 3
    provider.prefill(ids[:, :first])
    tokens = [provider.extend(ids[:, first:prompt]).clone()]
    tokens += [provider.step().clone() for _ in range(STEPS)]
    probe = ids[:, prompt:]
    chosen = torch.stack(tokens, dim=1)
    if int(chosen.min()) < 0:  # gemma_fast's word for logits that are not finite
        raise Wrong("its logits are not finite")
    read = torch.cat((ids[:, :prompt], chosen[:, :-1], probe), dim=1)
    return Trial(read, chosen, provider.logits(probe))


def under_the_best(logits: Tensor, tokens: Tensor) -> Tensor:
    """Distance of a token's logit from the largest: logits :: […, vocab], tokens :: […] → […]"""
    return logits.amax(-1) - logits.gather(-1, tokens[..., None])[..., 0]
