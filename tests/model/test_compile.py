"""Tests the whole model under torch.compile: it has no graph breaks and gives the same logits."""

import shutil

import pytest
import torch
from marks import RICHEST_FAMILIES
from tiny_models import CONFIGS, close, random_model

from gemma_fast.model.cache import KVCache


def check_compiled(model, backend):
    ids = torch.randint(3, model.config.vocab_size, (2, 12))

    def step(ids, cache):
        return model.logits(model.hidden_states(ids, cache))

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    with torch.no_grad():
        logits = compiled(ids, KVCache(model.config, 2, 12, dtype=torch.float32))
    close(logits, model(ids).logits)


@RICHEST_FAMILIES
def test_the_whole_model_traces_without_a_graph_break(twins):
    check_compiled(twins.model, "aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler")
def test_inductor_compiles_the_whole_model():
    check_compiled(random_model(CONFIGS["gemma3-mqa"]), "inductor")
