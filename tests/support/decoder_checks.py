"""Contains sampling options and a simulated CUDA graph for the engine tests."""

from collections.abc import Callable

from gemma_fast.model.cache import KVCache

NEVER = {"eos_token_id": []}  # no token ends a text
SAMPLINGS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 2.0, "seed": 3, "top_k": 0},
    "filtered": {"do_sample": True, "temperature": 2.0, "seed": 3, "top_k": 9, "top_p": 0.9},
    "penalised": {"repetition_penalty": 1.5},
    "biased": {"no_repeat_ngram_size": 2},
}


class Graph:
    """Simulates a CUDA graph of the decode step: replay() runs the step. Like StepGraphs.capture,
    the constructor increases the cache's token counts on the host, but computes no token."""

    def __init__(self, step: Callable[[], None], cache: KVCache) -> None:
        self.step, self.cache, self.replays = step, cache, 0
        cache.count(1)

    def replay(self) -> None:
        self.cache.count(-1)  # undoes the count of the step: a real replay counts no token
        self.step()
        self.replays += 1
