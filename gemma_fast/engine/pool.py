"""`DecoderPool` stores the decoders that a model keeps for its next calls of generate()."""

from __future__ import annotations

import torch

from gemma_fast.engine.decoder import Decoder, bucket_of
from gemma_fast.model.gemma import Gemma


class DecoderPool(dict[int, Decoder]):
    """Maps batch sizes to unused decoders: a decoder in use is not in the pool, so that only one
    caller uses it. A copy of the pool is empty."""

    def take(self, model: Gemma, batch: int, max_length: int) -> Decoder:
        """Removes a decoder that fits from the pool, or creates one. The caller returns the decoder
        to the pool with `give_back`."""
        kept = self.pop(bucket_of(batch), None)
        if kept is not None and kept.fits(model, max_length):
            kept.model = model
            return kept
        del kept  # frees the memory of this decoder before another one is created
        try:
            return Decoder(model, batch, max_length)
        except torch.OutOfMemoryError:
            if not self:
                raise
        self.clear()  # frees the decoders of other batch sizes
        return Decoder(model, batch, max_length)

    def give_back(self, decoder: Decoder) -> None:
        decoder.release()
        del decoder.model  # otherwise, a reference cycle keeps the model alive after its last use
        self[decoder.cache.batch] = decoder

    def memory(self) -> dict[str, int]:
        """Returns the bytes on the device: "cache" (KV caches, samplers), "graph" (CUDA graphs)."""
        kept = [decoder.memory() for decoder in self.values()]
        return {name: sum(x[name] for x in kept) for name in ("cache", "graph")}

    def __reduce__(self) -> tuple[type[DecoderPool], tuple[()]]:
        return DecoderPool, ()
