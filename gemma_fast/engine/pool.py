"""The decoders that a model keeps for its next texts."""

from __future__ import annotations

import torch

from gemma_fast.engine.decoder import Decoder, bucket_of
from gemma_fast.model.gemma import Gemma


class DecoderPool(dict[int, Decoder]):
    """Decoders by batch size, each for one caller at a time; a copy of the pool is empty."""

    def take(self, model: Gemma, batch: int, max_length: int) -> Decoder:
        """One that fits, for this caller alone until it is given back."""
        kept = self.pop(bucket_of(batch), None)
        if kept is not None and kept.fits(model, max_length):
            kept.model = model
            return kept
        del kept  # its memory first
        try:
            return Decoder(model, batch, max_length)
        except torch.OutOfMemoryError:
            if not self:
                raise
        self.clear()  # what other batches left
        return Decoder(model, batch, max_length)

    def give_back(self, decoder: Decoder) -> None:
        decoder.wait()
        del decoder.model  # which would else live until cycles are collected
        self[decoder.cache.batch] = decoder

    def memory(self) -> dict[str, int]:
        """Bytes on the device: caches and CUDA graphs."""
        kept = [decoder.memory() for decoder in self.values()]
        return {name: sum(x[name] for x in kept) for name in ("cache", "graph")}

    def __reduce__(self) -> tuple[type[DecoderPool], tuple[()]]:
        return DecoderPool, ()
