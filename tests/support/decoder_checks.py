"""What the tests of the engine share: ways to choose a token, and a CUDA graph's stand-in."""

from gemma_fast.engine.decoder import Decoder

NEVER = {"eos_token_id": []}
SAMPLINGS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 2.0, "seed": 3},
    "filtered": {"do_sample": True, "temperature": 2.0, "seed": 3, "top_k": 9, "top_p": 0.9},
    "penalised": {"repetition_penalty": 1.5},
}


class Graph:
    """Stands in for a CUDA graph: what is recorded is run when it is replayed. Made as
    Decoder._capture makes one, with the step counted."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.replays = decoder, 0
        decoder.cache.count(1)

    def replay(self) -> None:
        self.decoder.cache.count(-1)  # a graph counts nothing on the host, `_step` does
        self.decoder._step()
        self.replays += 1
