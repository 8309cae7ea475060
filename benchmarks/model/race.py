"""Measures prefill (pp) and decode (tg) speed of a whole model. Test names are as in llama-bench:

    pp512          prefill of 512 tokens, until the first new token
    tg128          128 decode steps
    tg128 @ d4096  the same, with 4096 tokens already in the cache; see cases.py

A test is repeated several times. Each repeat is timed as a whole, after the device's clock rates
have settled. The timer waits for the device at the start and at the end; tokens are not read back
in between. The times of single tokens come from one additional pass. On a GPU it records a device
event after each step, so the host can launch later steps ahead. On a CPU it uses the wall clock.

On a CPU, all providers are loaded together if they fit in memory, and their repeats take turns: the
machine's speed may change during a run, and then it changes for all. On a GPU one provider runs
after another, because the memory of each is measured.

Before a provider is timed, judge.py checks it, with at least as many tokens in its cache as in the
test, if the context allows. In float32, its greedy tokens must equal the reference's. In a 16-bit
dtype, the reference computes in float32 with the same weights: the logits that it gives to the
provider's greedy tokens must be close to its largest logits. Also, our error must not be much
larger than transformers' (see judge.SLACK). A wrong provider is not timed.

Many prompts that arrive together are another test, with other providers; see arrival.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import click
import torch

from gemma_fast.benchmarks.measure.machine import Roof
from gemma_fast.benchmarks.measure.outcome import NOT_MEASURED
from gemma_fast.benchmarks.measure.timing import interleaved
from gemma_fast.benchmarks.model.arrival import ArrivalAttempt
from gemma_fast.benchmarks.model.attempt import Attempt, Loaded, clear
from gemma_fast.benchmarks.model.cases import ARRIVAL, Case
from gemma_fast.benchmarks.model.judge import Judge
from gemma_fast.benchmarks.model.providers import (
    ARRIVAL_PROVIDERS,
    OWN_DTYPES,
    PROVIDERS,
    providers_of,
)
from gemma_fast.benchmarks.model.result import ModelResult
from gemma_fast.checkpoint.base import Checkpoint
from gemma_fast.config import GemmaConfig
from gemma_fast.memory import free_bytes

Group = list[tuple[str, torch.dtype]]  # providers that are loaded together


def groups(
    config: GemmaConfig, names: Sequence[str], dtypes: Sequence[torch.dtype], device: torch.device
) -> list[Group]:
    """Returns the named providers in each dtype: one group whose repeats take turns, or a group for
    each on a GPU or if they do not fit in memory together.

    They are in the order of PROVIDERS, in which transformers runs before gemma_fast, because the
    judge compares our error with transformers'.
    """
    names = [name for name in PROVIDERS | ARRIVAL_PROVIDERS if name in names]
    entries = [(name, dtype) for name in names for dtype in OWN_DTYPES.get(name, dtypes)]
    # Weights and activations, as in Judge.
    needed = 1.5 * config.num_parameters * sum(dtype.itemsize for _, dtype in entries)
    together = device.type == "cpu" and needed < free_bytes(device)
    return [entries] if together else [[entry] for entry in entries]


@torch.no_grad()
def run(
    checkpoint: Checkpoint, cases: Sequence[Case], device: torch.device, groups: Sequence[Group],
    roof: Roof | None, repeats: int, judge: Judge,
) -> Iterator[ModelResult]:  # fmt: skip
    """Yields the results, group by group and case by case. Without a roof, nothing is timed.

    cases: of the kinds pp and tg, or all of the kind arrival
    """
    for group in groups:
        yield from run_group(checkpoint, cases, device, group, roof, repeats, judge)


def run_group(
    checkpoint: Checkpoint, cases: Sequence[Case], device: torch.device, group: Group,
    roof: Roof | None, repeats: int, judge: Judge,
) -> Iterator[ModelResult]:  # fmt: skip
    arrival, loaded = cases[0].kind == ARRIVAL, []
    for name, dtype in group:
        loaded.append(Loaded(name, providers_of(arrival)[name], dtype, checkpoint, device))
        click.echo(f"{loaded[-1].label}: {loaded[-1].told}", err=True)
    for case in cases:
        attempt = ArrivalAttempt if arrival else Attempt
        attempts = [attempt(x, case, device) for x in loaded]
        race(attempts, judge, roof, repeats)
        yield from (x.result for x in attempts)


def race(attempts: Sequence[Attempt], judge: Judge, roof: Roof | None, repeats: int) -> None:
    """Checks all providers in one case, then times those that passed, in turns."""
    for attempt in attempts:
        attempt.do(clear)
    for attempt in attempts:
        attempt.do(partial(attempt.check, judge))
        if attempt.result.status == "ok":
            click.echo(f"{attempt.case.name}: {attempt.result.label}: checked", err=True)
    passed = [x for x in attempts if x.result.status == "ok"]
    if roof is None:
        for attempt in passed:
            attempt.result = replace(attempt.result, status=NOT_MEASURED)
        return
    for attempt in passed:
        attempt.do(partial(attempt.warm_up, judge.vocab_size))
    seconds = interleaved([partial(x.do, x.once) for x in passed], repeats)
    for attempt, times in zip(passed, seconds, strict=True):
        attempt.do(partial(attempt.finish, times, roof))
