"""Tests decode steps on a CPU whose C calls are repeated, against steps that run each time."""

from dataclasses import replace

import pytest
import torch
from c_kernels import needs_c
from tiny_models import CONFIGS

from gemma_fast import GemmaForCausalLM
from gemma_fast.checkpoint.random import RandomCheckpoint
from gemma_fast.engine.decoder import Decoder
from gemma_fast.engine.sampling import Sampling
from gemma_fast.kernels.cpu import calls
from gemma_fast.kernels.cpu.replay import Replay
from gemma_fast.kernels.matvec import linear

pytestmark = needs_c
NAMES = "gemma3-gqa", "gemma4-experts"  # experts are chosen anew in each step
SIZES = {"hidden_size": 64, "intermediate_size": 96}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", ["one row", "the most rows in C", "one row more"])
@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_repeated_steps_have_the_logits_of_steps_that_run(size, quantize, name):
    """With more rows, C unpacks a weight, and a library multiplies with it."""
    config = replace(CONFIGS[name], **SIZES)
    if config.num_experts:
        config = replace(config, moe_intermediate_size=32)
    model = GemmaForCausalLM.from_checkpoint(RandomCheckpoint(config), quantize=quantize)
    most = calls.MAX_ROWS[model.dtype][quantize != "none"]
    batch = {"one row": 1, "the most rows in C": most, "one row more": most + 1}[size]
    ids = torch.randint(3, config.vocab_size, (batch, 5), generator=torch.Generator())
    found = []
    for replays in (True, False):
        decoder, logits = Decoder(model, batch, 20), []  # logits, before and after processing
        decoder._replays = decoder._replays if replays else None
        decoder.prefill(ids, texts=[Sampling()] * batch, record=logits)
        for _ in range(4):
            decoder.step()
        if replays:
            assert bool(decoder._replays[decoder.cache.batch]._calls) == (batch <= most)
        found.append(torch.stack([raw for raw, _ in logits]))
    assert found[0].numel() and torch.equal(*found)


def test_a_new_number_of_threads_has_an_effect():
    threads, x, used = torch.get_num_threads(), torch.ones(1, 64), []
    weight = torch.ones(2048, 64)

    def function(x):
        used.append(torch.get_num_threads())
        return linear(x, weight)

    replay = Replay()
    try:
        for count in (1, 1, 3, 3, 1):
            torch.set_num_threads(count)
            assert torch.equal(replay(function, x), linear(x, weight))
    finally:
        torch.set_num_threads(threads)
    assert used == [1, 3, 1]


def test_a_repeated_call_that_fails_raises(monkeypatch):
    replay, x, failing = Replay(), torch.ones(1, 64), lambda *_: int(len(made) > 1)
    made = []
    monkeypatch.setattr(calls, "_function", lambda name: made.append(name) or failing)
    replay(lambda x: linear(x, x), x)
    made.append("repeated")
    with pytest.raises(MemoryError):
        replay(lambda x: linear(x, x), x)
