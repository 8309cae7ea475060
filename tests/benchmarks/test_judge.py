"""Tests the judge of the model benchmark, which must detect wrong providers and pass correct ones.

A provider is an implementation of the model that is compared, for example transformers.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from click.testing import CliRunner
from marks import slow
from tiny_models import CONFIGS
from torch._dynamo.utils import counters

from gemma_fast.benchmarks.measure import timing
from gemma_fast.benchmarks.measure.machine import Roof
from gemma_fast.benchmarks.measure.outcome import (
    EAGER,
    NOT_MEASURED,
    OURS,
    WITHOUT_GRAPHS,
    Wrong,
    serious,
)
from gemma_fast.benchmarks.model import eager
from gemma_fast.benchmarks.model.cases import TINY, Case, find
from gemma_fast.benchmarks.model.eager import Eager
from gemma_fast.benchmarks.model.judge import Judge
from gemma_fast.benchmarks.model.providers import BESIDE_PACKED, PROVIDERS
from gemma_fast.benchmarks.model.race import groups, run
from gemma_fast.benchmarks.options import bench
from gemma_fast.checkpoint.random import RandomCheckpoint
from gemma_fast.reference import Reference

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
ROOF = Roof(copy=2e12, product=1e15)
TG2 = Case("tg", 2)
QUICK = partial(torch.compile, backend="eager", fullgraph=True, dynamic=False)


def provider(change):
    """Returns a provider that calls change(reference), and then runs this modified reference."""

    def load(checkpoint, dtype, device):
        reference = Reference.from_checkpoint(checkpoint, dtype=dtype, device=device)
        change(reference)
        return Eager(reference)

    return load


def noise(share):
    """Returns a provider with random errors in the weights; `share` is their relative size."""

    def change(reference):
        for weight in reference.weights.values():
            weight.mul_(1 + share * torch.randn_like(weight))

    return provider(change)


def without_rotary(reference):
    attention = reference.attention

    def unrotated(name, x, visible, cos_sin, *rest):
        cos, sin = cos_sin
        return attention(name, x, visible, (torch.ones_like(cos), torch.zeros_like(sin)), *rest)

    reference.attention = unrotated


class Repeating(Eager):
    """Computes each step correctly, but returns the previous token."""

    def step(self):
        said = self.token
        super().step()
        return said


class Forgetting(Eager):
    """Drops new tokens from the cache. Greedy tokens may still be right; later logits are wrong."""

    def step(self):
        past = self.past
        token = super().step()
        self.past = past
        return token


class Short(Eager):
    """Is correct up to 100 cached tokens. With more tokens, it overwrites the cache with noise."""

    def extend(self, ids):
        token = super().extend(ids)
        if self.past[0][0].shape[2] > 100:
            self.past = [(torch.randn_like(k), torch.randn_like(v)) for k, v in self.past]
        return token


def absent(checkpoint, dtype, device):
    raise ModuleNotFoundError("No module named 'rival'", name="rival")


def kind(eager):
    """Returns a provider that runs the correct reference. `eager` is Eager or a subclass."""
    return lambda *where: eager(Reference.from_checkpoint(where[0], dtype=where[1], device=CPU))


def judged(monkeypatch, dtype, providers, case=TG2, config=TINY):
    """Runs the providers with a tiny model, and returns their statuses by name.

    Correct providers are timed, because ROOF, the peak rates, is passed.
    """
    monkeypatch.setattr(timing, "ENOUGH", 0)
    for name in list(PROVIDERS):
        monkeypatch.delitem(PROVIDERS, name)
    for name, load in providers.items():
        monkeypatch.setitem(PROVIDERS, name, load)
    checkpoint = RandomCheckpoint(config)
    judge = Judge(checkpoint, dtype, CPU)
    order = groups(checkpoint.config, list(providers), [dtype], CPU)
    found = list(run(checkpoint, [case], CPU, order, ROOF, 1, judge))
    assert all(bool(r.seconds) == r.status.startswith("ok") for r in found)
    assert serious(found) == any(r.status.startswith("wrong") for r in found)
    return {r.provider: r.status for r in found}


def test_wrong_providers_are_not_timed(monkeypatch):
    found = judged(monkeypatch, FP32, {
        EAGER: kind(Eager), "rotary": provider(without_rotary), "repeating": kind(Repeating),
        "forgetting": kind(Forgetting), "absent": absent,
    })  # fmt: skip
    assert found[EAGER] == "ok"
    assert found["rotary"].startswith("wrong: error ")
    assert found["repeating"].startswith("wrong: ")
    assert found["forgetting"].startswith("wrong: error ")
    assert found["absent"] == "not installed: No module named 'rival'"


def without_layer_scalar(reference):
    for name, weight in reference.weights.items():
        if name.endswith("layer_scalar"):
            weight.fill_(1)


def with_own_keys_and_values(reference):
    """Layers that share K and V read those of the first layer with the same shapes."""
    layer = reference.layer
    kinds = [x.kind for x in reference.config.layers]
    seen = {}

    def wrong(i, hiddens, visible, cos_sin, past=None, shared=None, per_layer=None):
        shared = None if shared is None else seen[kinds[i]]
        hiddens, pair = layer(i, hiddens, visible, cos_sin, past, shared, per_layer)
        if i == kinds.index(kinds[i]):
            seen[kinds[i]] = pair
        return hiddens, pair

    reference.layer = wrong


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_wrong_providers_of_gemma_4_are_not_timed(dtype, monkeypatch):
    """With random weights of Gemma 4, too, greedy tokens and logits depend on every step."""
    config = replace(CONFIGS["gemma4-shared"], max_position_embeddings=1024)
    found = judged(monkeypatch, dtype, {
        EAGER: kind(Eager), "rotary": provider(without_rotary), "repeating": kind(Repeating),
        "forgetting": kind(Forgetting), "other keys": provider(with_own_keys_and_values),
        "scalar": provider(without_layer_scalar),
        "transformers (sdpa)": PROVIDERS["transformers (sdpa)"], OURS: PROVIDERS[OURS],
    }, config=config)  # fmt: skip
    assert found.pop(EAGER) == found.pop(OURS) == found.pop("transformers (sdpa)") == "ok"
    if dtype == BF16:  # the scalars' effect is smaller than the limit in 16 bits
        assert found.pop("scalar") == "ok"
    assert {status.split(":")[0] for status in found.values()} == {"wrong"}, found


@pytest.mark.slow
def test_error_that_appears_only_at_the_timed_length_is_found(monkeypatch):
    providers = {EAGER: kind(Eager), "short": kind(Short)}
    for case in (Case("tg", 4, depth=300), Case("pp", 300), Case("pp", 4, depth=300, batch=6)):
        found = judged(monkeypatch, FP32, providers, case)
        assert found[EAGER] == "ok" and found["short"].startswith("wrong: error "), case
    assert judged(monkeypatch, FP32, providers) == {EAGER: "ok", "short": "ok"}


def test_skipped_cuda_graphs_are_in_the_status(monkeypatch):
    class Skipping(Eager):
        def start(self, *given):
            super().start(*given)
            counters["inductor"]["cudagraph_skips"] += 1

    found = judged(monkeypatch, FP32, {EAGER: kind(Eager), "static": kind(Skipping)})
    assert found == {EAGER: "ok", "static": WITHOUT_GRAPHS}


def test_reference_reads_each_prefix_once(monkeypatch):
    judge, read = Judge(RandomCheckpoint(TINY), FP32, CPU), []
    forward = judge.reference.forward

    def reference(ids, **options):
        read.append(ids.shape[1])
        return forward(ids, **options)

    monkeypatch.setattr(judge, "reference", reference)
    deep = Eager(Reference.from_checkpoint(RandomCheckpoint(TINY), dtype=FP32, device=CPU))
    for _ in range(2):
        deep.start(1, 0, "tg")
        judge.check(EAGER, deep, Case("tg", 4, depth=1100))
    assert read == [1024, 76, 48, 48]
    # the prefix leaves room in the context for the trial's 24 + 16 + 8 tokens
    assert judge.prefix(Case("pp", 16384)) == 16384 - 48


def test_out_of_memory_in_the_judge_is_in_the_status(monkeypatch):
    def too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Judge, "judge", too_much)
    found = judged(monkeypatch, BF16, {EAGER: kind(Eager)})
    assert found == {EAGER: "cannot: not enough memory for the reference"}


def test_wrong_transformers_does_not_increase_the_error_limit_of_gemma_fast(monkeypatch):
    providers = {"transformers (eager)": kind(Eager), "transformers (sdpa)": noise(0.5)}
    found = judged(monkeypatch, BF16, {**providers, OURS: noise(0.01)})
    assert found["transformers (sdpa)"].startswith("wrong: error ")
    assert found[OURS].startswith("wrong: error ") and "transformers' is" in found[OURS]


def test_report_states_whether_gemma_fast_was_compared_to_transformers():
    judge = Judge(RandomCheckpoint(TINY), BF16, CPU)
    judge.compare(OURS, 0.01, [])
    assert judge.about.endswith("gemma_fast's error was not compared to transformers'.")
    judge.compare("transformers (eager)", 0.01, rivals := [])
    judge.compare(OURS, 0.01, rivals)
    assert judge.about.endswith("gemma_fast's error was compared to transformers'.")


@pytest.mark.slow
def test_in_16_bits_transformers_error_limits_the_error_of_gemma_fast(monkeypatch):
    found = judged(monkeypatch, BF16, {
        "rotary": provider(without_rotary), "transformers (eager)": kind(Eager), OURS: kind(Eager),
    })  # fmt: skip
    assert found["rotary"].startswith("wrong: error ")
    assert found[OURS] == found["transformers (eager)"] == "ok"
    found = judged(monkeypatch, BF16, {"transformers (eager)": kind(Eager), OURS: noise(0.01)})
    assert found["transformers (eager)"] == "ok"
    assert found[OURS].startswith("wrong: error ") and "transformers' is" in found[OURS]
    assert judged(monkeypatch, BF16, {OURS: noise(0.01)}) == {OURS: "ok"}


def test_reference_keeps_the_given_dtype_if_float32_does_not_fit(monkeypatch):
    monkeypatch.setattr("gemma_fast.benchmarks.model.judge.free_bytes", lambda device: 0)
    judge = Judge(find("tiny"), BF16, CPU)
    assert "the reference in bfloat16, as float32 does not fit." in judge.about
    assert judge.reference.weights["model.norm.weight"].dtype == BF16


def test_one_judge_checks_several_dtypes():
    """The reference keeps float32's weights, and transformers' error counts in its dtype only."""
    checkpoint = RandomCheckpoint(TINY)
    judge, names = Judge(checkpoint, BF16, CPU, FP32), ["transformers (sdpa)", OURS]
    order = groups(TINY, names, [BF16, FP32], CPU)
    found = list(run(checkpoint, [TG2], CPU, order, None, 1, judge))
    assert [(r.dtype, r.status) for r in found] == [
        (dtype, NOT_MEASURED) for _ in names for dtype in ("bfloat16", "float32")
    ]
    assert max(r.error for r in found if r.dtype == "float32") < 1e-4
    assert [(dtype, len(errors)) for (dtype, *_), errors in judge.errors.items()] == [(BF16, 1)]
    assert judge.about.endswith("gemma_fast's error was compared to transformers'.")
    judge.errors[BF16, 1, 0][:] = [1e-9]
    provider = PROVIDERS[OURS](checkpoint, BF16, CPU)
    provider.start(1, judge.room(TG2), TG2.kind)
    with pytest.raises(Wrong, match="transformers' is 1e-09"):
        judge.check(OURS, provider, TG2, BF16)


def test_exit_status_is_1_if_a_result_is_wrong(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(PROVIDERS, OURS, provider(without_rotary))
    done = CliRunner().invoke(bench, ["-p", "4", "--only", OURS])
    assert done.exit_code == 1 and "wrong: error" in done.stdout


# test_race.py covers Gemma 3: its tiny model is a Gemma 3 model.
@pytest.mark.parametrize("name", slow("gemma-mqa", "gemma2-gqa", "gemma4-all"))
def test_every_provider_returns_the_tokens_of_the_reference(name, monkeypatch):
    """The prompt is longer than the window. Steps are compiled with fullgraph=True, but with the
    backend "eager", because Inductor would take minutes."""
    monkeypatch.setattr(eager, "compiled_step", QUICK)
    checkpoint = RandomCheckpoint(replace(CONFIGS[name], max_position_embeddings=1024))
    judge = Judge(checkpoint, FP32, CPU)
    names = [name for name in PROVIDERS if name not in BESIDE_PACKED]
    order = groups(checkpoint.config, names, [FP32], CPU)
    found = run(checkpoint, [Case("tg", 4, batch=2)], CPU, order, None, 1, judge)
    statuses = {r.provider: r.status for r in found}
    assert list(statuses) == names
    if name == "gemma2-gqa":
        assert statuses.pop("transformers (sdpa)") == "cannot: no soft cap"
    assert set(statuses.values()) == {"ok, not measured"}
