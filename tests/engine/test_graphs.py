"""Tests which CUDA graphs StepGraphs keeps."""

import torch
from decoder_checks import Graph
from tiny_models import CONFIGS

from gemma_fast.engine import graphs as graphs_module
from gemma_fast.engine.graphs import StepGraphs
from gemma_fast.model.cache import KVCache


def test_the_graph_that_was_not_used_for_the_longest_time_is_dropped(monkeypatch):
    """ "a" is the oldest one, and it is used between all others, so it is captured once."""
    monkeypatch.setattr(graphs_module, "MAX_GRAPHS", 2)
    captured = []

    def capture(self, step, cache):
        captured.append(step.key)
        return Graph(step, cache)

    class Step:
        def __init__(self, key):
            self.key = key

        def __call__(self):
            cache.count(1)

    monkeypatch.setattr(StepGraphs, "capture", capture)
    cache = KVCache(CONFIGS["gemma3-gqa"], 1, 64, dtype=torch.float32)
    steps = StepGraphs(torch.device("cpu"))
    keys = [key for key in "abc" for _ in range(2)] + [*"abacab"]
    for key in keys:
        steps.run(key, Step(key), cache)
    assert captured == ["a", "b", "c", "a", "b", "c", "b"]
    assert cache.length == len(keys)
