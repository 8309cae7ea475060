"""DecoderPool: the decoders that a model keeps for its next calls."""

from __future__ import annotations

import torch

from gemma_fast.engine.decoder import Decoder, bucket_of
from gemma_fast.model.gemma import Gemma


class DecoderPool(dict[int, Decoder]):
    """Batch size → decoder, which one caller uses at a time. A copy of the pool is empty."""

    def take(self, model: Gemma, batch: int, max_length: int) -> Decoder:
        """Removes a decoder that fits from the pool, or creates one. Return it with `give_back`."""
        kept = self.pop(bucket_of(batch), None)
        if kept is not None and kept.fits(model, max_length):
            kept.model = model
            return kept
        del kept  # frees its memory first
        try:
            return Decoder(model, batch, max_length)
        except torch.OutOfMemoryError:
            if not self:
                raise
        self.clear()  # frees the decoders of other batch sizes
        return Decoder(model, batch, max_length)

    def give_back(self, decoder: Decoder) -> None:
        decoder.wait()
        del decoder.model  # or the reference cycle keeps the model alive until garbage collection
        self[decoder.cache.batch] = decoder

    def memory(self) -> dict[str, int]:
        """Bytes on the device: "cache" (KV caches and samplers) and "graph" (CUDA graphs)."""
        kept = [decoder.memory() for decoder in self.values()]
        return {name: sum(x[name] for x in kept) for name in ("cache", "graph")}

    def __reduce__(self) -> tuple[type[DecoderPool], tuple[()]]:
        return DecoderPool, ()
