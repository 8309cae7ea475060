"""Whether a provider computes the model: its own greedy tokens and the cache it fills on the way,
before the judgement of the reference in float32."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gemma_fast.benchmarks.harness import OURS, Wrong, error
from gemma_fast.benchmarks.model_providers import Provider
from gemma_fast.checkpoint import Checkpoint
from gemma_fast.reference import Reference

TOKENS, STEPS, PROBE = 24, 16, 8  # of the prompt, beside its window; decoded; read after those
LONG = 1024  # windows up to this are passed by the prompt
# Of the logits' error, see harness.error, and of the regret. Without rotary embedding the error is
# 0.46; by rounding to bf16, with Gemma 3 270M, 0.012 to 0.025, and 0.016 with random weights.
TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 1e-4}
SLACK = 1.25  # times transformers' largest error: two roundings of one model differ by as much


class Trial(NamedTuple):
    ids: Tensor  # [b, prompt + steps + probe]: what was read, greedy tokens between
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
        self.reference = Reference.from_checkpoint(checkpoint, dtype=dtype, device=device)
        # Weights of this judge, and of the provider beside it with room to work.
        needed = config.num_parameters * (4 + 1.5 * dtype.itemsize)
        self.exact = dtype == torch.float32 or needed < free_bytes(device)
        if self.exact:
            for name, weight in self.reference.weights.items():
                self.reference.weights[name] = weight.float()
        windows = [config.window(i) or 0 for i in range(config.num_hidden_layers)]
        self.prompt = TOKENS + max((w for w in windows if w <= LONG), default=0)
        self.room = self.prompt + STEPS + PROBE
        self.errors: dict[tuple[int, int], dict[str, float]] = {}  # by batch and depth

    @property
    def about(self) -> str:
        kind = "float32" if self.exact else f"{self.dtype}, as float32 does not fit".split(".")[1]
        return f"Checked against the reference in {kind}."

    def check(self, name: str, provider: Provider, batch: int, depth: int) -> float:
        """The error of its logits. Raises Wrong, or what the provider raises."""
        trial = try_out(provider, self._ids(batch), self.prompt)
        if trial.logits.dtype != self.dtype:
            raise Wrong(f"logits are {trial.logits.dtype}, not {self.dtype}")
        found, regret = self.judge(trial)
        others = self.errors.setdefault((batch, depth), {})
        others[name] = found
        limit = TOLERANCE[self.dtype]
        if not found <= limit:
            raise Wrong(f"error {found:.2g}, more than {limit:g}")
        if self.dtype == torch.float32 and regret:
            raise Wrong("its greedy tokens are not the reference's")
        if not regret <= limit:
            raise Wrong(f"chooses tokens {regret:.2g} under the best, more than {limit:g}")
        rivals = [x for rival, x in others.items() if rival.startswith("transformers")]
        if name == OURS and self.exact and self.dtype != torch.float32 and rivals:
            limit = SLACK * max(rivals) + 1e-3
            if found > limit:
                raise Wrong(f"error {found:.2g}; transformers' is {max(rivals):.2g}")
        return found

    def judge(self, trial: Trial) -> tuple[float, float]:
        """Error and regret; a few sequences at a time, as logits are large."""
        errors, regrets = [], []
        for ids, tokens, logits in zip(*(x.split(4) for x in trial), strict=True):
            truth = self.reference(ids, logits_to_keep=STEPS + PROBE + 1, use_cache=False).logits
            truth = truth.float()
            chosen = truth[:, : STEPS + 1]
            # The probe's first token stands in place of the newest one.
            errors.append(error(logits, truth[:, STEPS + 1 :]))
            best, picked = chosen.amax(-1), chosen.gather(-1, tokens[..., None])[..., 0]
            regrets.append(float(((best - picked) / chosen.std(-1)).mean()))
        return max(errors), max(regrets)

    def _ids(self, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        shape = batch, self.prompt + PROBE
        return torch.randint(3, self.vocab_size, shape, generator=generator).to(self.device)


def try_out(provider: Provider, ids: Tensor, prompt: int) -> Trial:
    """A prompt in two parts, greedy steps after it, and the logits of a few tokens after those."""
    half = prompt - prompt // 3
    provider.prefill(ids[:, :half])
    tokens = [provider.extend(ids[:, half:prompt]).clone()]
    tokens += [provider.step().clone() for _ in range(STEPS)]
    probe = ids[:, prompt:]
    chosen = torch.stack(tokens, dim=1)
    if int(chosen.min()) < 0:  # gemma_fast's word for logits that are not finite
        raise Wrong("its logits are not finite")
    read = torch.cat((ids[:, :prompt], chosen[:, :-1], probe), dim=1)
    return Trial(read, chosen, provider.logits(probe))


def free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return found[0] if found else math.inf
