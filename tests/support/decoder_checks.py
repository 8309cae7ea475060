"""Shared by the engine tests: ways to sample tokens, and a stand-in for CUDA graphs."""

from gemma_fast.engine.decoder import Decoder

NEVER = {"eos_token_id": []}
SAMPLINGS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 2.0, "seed": 3},
    "filtered": {"do_sample": True, "temperature": 2.0, "seed": 3, "top_k": 9, "top_p": 0.9},
    "penalised": {"repetition_penalty": 1.5},
}


class Graph:
    """Stands in for a CUDA graph of the decode step: a replay runs the step. As after
    Decoder._capture, the cache has already counted the first step."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.replays = decoder, 0
        decoder.cache.count(1)

    def replay(self) -> None:
        self.decoder.cache.count(-1)  # `_step` counts, but a replay must not
        self.decoder._step()
        self.replays += 1
