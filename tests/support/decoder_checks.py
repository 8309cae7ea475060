"""Contains sampling options and a simulated CUDA graph for the engine tests."""

from gemma_fast.engine.decoder import Decoder

NEVER = {"eos_token_id": []}  # no token ends a text
SAMPLINGS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 2.0, "seed": 3, "top_k": 0},
    "filtered": {"do_sample": True, "temperature": 2.0, "seed": 3, "top_k": 9, "top_p": 0.9},
    "penalised": {"repetition_penalty": 1.5},
    "biased": {"no_repeat_ngram_size": 2},
}


class Graph:
    """Simulates a CUDA graph of the decode step: replay() runs the step. Like Decoder._capture, the
    constructor increases the cache's token counts on the host, but computes no token."""

    def __init__(self, decoder: Decoder, rows: int) -> None:
        self.decoder, self.rows, self.replays = decoder, rows, 0
        decoder.cache.rows(slice(0, rows)).count(1)

    def replay(self) -> None:
        # Undoes the count of `_step`: a real replay counts no token.
        self.decoder.cache.rows(slice(0, self.rows)).count(-1)
        self.decoder._step(self.rows)
        self.replays += 1
