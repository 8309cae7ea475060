"""Decoder: one cache, and the step that adds a token to each of its sequences.

    prompt → prefill → token → step → token → step → …

On a GPU the step is captured in a CUDA graph, embedding to choice, and then replayed: the host
launches one thing a token. The first step of a kind runs as it is, so that its kernels are
compiled; the second is captured. What may differ between replays, tokens, positions, temperature
and seed, lies on the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma_fast.cache import KVCache
from gemma_fast.load import out_of_memory
from gemma_fast.sampling import Sampling

if TYPE_CHECKING:
    from gemma_fast.model import GemmaForCausalLM

# A prompt is read in chunks of this many tokens, which bounds the memory its activations take.
PREFILL_CHUNK = 2048
ROUND_UP = 256  # tokens: a slightly longer text needs no new cache, and no new graph


class Decoder:
    """Decoding of up to `batch` sequences of up to `max_length` tokens.

    cache :: KVCache for the batch, rounded up to a power of two: rows that no text uses are decoded
              along
    token :: [b], int64, on the device: the newest token of each text; -1 where the logits were not
             finite. The cache does not hold it yet.
    asynchronous :: whether `step` returns before its token is there, as on a GPU
    """

    def __init__(self, model: GemmaForCausalLM, batch: int, max_length: int) -> None:
        self.model = model
        self.weights = model.embed_tokens.data_ptr()
        length = min(-(-max_length // ROUND_UP) * ROUND_UP, model.config.max_position_embeddings)
        bucket, device = bucket_of(batch), model.device
        size = KVCache.bytes_needed(model.config, bucket, length, model.dtype)
        # Not as inference tensors, which could not be written to outside of inference mode.
        with (
            torch.inference_mode(False),
            out_of_memory(
                f"a KV cache for {bucket} sequences of {length} tokens", size, device,
                "a smaller batch, shorter prompts or max_new_tokens",
            ),
        ):  # fmt: skip
            self.cache = KVCache(model.config, bucket, length, dtype=model.dtype, device=device)
            self._token = torch.zeros(bucket, dtype=torch.int64, device=device)
            self._seed = torch.zeros(1, dtype=torch.int64, device=device)
            self._temperature = torch.ones(1, device=device)
            self._seen = torch.zeros(0, dtype=torch.bool, device=device)
        self.asynchronous = device.type == "cuda"
        self._sampling = Sampling()
        self._rows = batch
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm_for: Any = None  # the graph key of the step that ran last
        self._graph_bytes, self._capture_seconds = 0, 0.0

    def fits(self, model: GemmaForCausalLM, max_length: int) -> bool:
        """Whether it is for this model as it is now, and for texts of this length."""
        same = (self.weights, self.cache.device, self.cache.dtype)
        now = (model.embed_tokens.data_ptr(), model.device, model.dtype)
        return same == now and max_length <= self.cache.max_length

    @property
    def token(self) -> Tensor:
        return self._token[: self._rows]

    def prefill(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> None:
        """Starts anew: reads prompts, ids :: [b, t], and chooses the first token of each."""
        self._sampling = sampling or Sampling()
        self._seed.fill_(seed)
        self._temperature.fill_(self._sampling.temperature)
        self._rows = len(ids)
        self._token.zero_()
        self.cache.clear()
        if self._sampling.penalises:
            vocab = self.model.config.vocab_size
            if not self._seen.numel():
                self._seen = self._seen.new_zeros(len(self._token), vocab)
            self._seen.zero_()
        self.extend(ids, attention_mask)

    def extend(self, ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Reads more of the texts, ids :: [b, t], in place of `token`, and chooses the next one."""
        part = self.cache.first_rows(self._rows)
        part.reserve(ids.shape[1])
        part.align(ids.shape[1], attention_mask)
        if self._sampling.penalises:
            self._seen[: self._rows].scatter_(1, ids, True)
        for chunk in ids.split(PREFILL_CHUNK, dim=1):
            x, residual = self.model.hidden_states(chunk, part)
        self.cache.length, self.cache.stale = part.length, part.stale
        self._choose(x[:, -1], residual[:, -1], self._rows)

    def step(self) -> None:
        """Decodes `token` and chooses the next one."""
        self.cache.reserve(1)
        if not self.asynchronous:
            self._step()
        elif self._warm_for != self._sampling.graph_key:
            self._graph = None
            self._step()
            self._warm_for = self._sampling.graph_key
        else:
            if self._graph is None:
                self._graph = self._capture()
            self._graph.replay()
            self.cache.length += 1

    def read(self) -> Callable[[], Tensor]:
        """Starts copying `token` to the host → a call that waits for it and gives it: [b]."""
        if not self.asynchronous:
            token = self.token.clone()
            return lambda: token
        host = torch.empty(self._rows, dtype=torch.int64, pin_memory=True)
        host.copy_(self.token, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self._token.device))

        def wait() -> Tensor:
            done.synchronize()
            return host

        return wait

    def memory(self) -> dict[str, float]:
        """What it takes on the device, in bytes, and how long its graph took to capture."""
        return {
            "cache": self.cache.nbytes,
            "graph": self._graph_bytes,
            "capture_s": self._capture_seconds,
        }

    def _step(self) -> None:
        ids = self._token.unsqueeze(1)
        if self._sampling.penalises:
            self._seen.scatter_(1, ids.clamp(min=0), True)
        x, residual = self.model.hidden_states(ids, self.cache)
        self._choose(x[:, -1], residual[:, -1], len(ids))

    def _choose(self, x: Tensor, residual: Tensor, rows: int) -> None:
        sampling, cache, token = self._sampling, self.cache, self._token[:rows]
        position = cache.next_position[:rows]
        if sampling.needs_logits:
            sampling.choose(
                self.model.logits(x, residual), self._seen[:rows], position, token, cache.arrived,
                self._temperature, self._seed,
            )  # fmt: skip
        elif sampling.do_sample:
            self.model.next_token(
                x, residual, position, token, cache.arrived, self._temperature, self._seed
            )
        else:
            self.model.next_token(x, residual, position, token, cache.arrived)

    def _capture(self) -> torch.cuda.CUDAGraph:
        start, length = time.perf_counter(), self.cache.length
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.memory_reserved()
        with (
            out_of_memory(
                "the CUDA graph of a decode step", 0, self._token.device, "a smaller batch"
            ),
            torch.cuda.device(self._token.device),
            torch.cuda.graph(graph, capture_error_mode="thread_local"),
        ):
            self._step()
        self.cache.length = length  # a capture runs nothing
        self._graph_bytes = max(torch.cuda.memory_reserved() - before, 0)
        self._capture_seconds = time.perf_counter() - start
        return graph


class Decoders(dict[int, Decoder]):
    """A model's decoders, by batch, kept for its next texts; copies of the model have none."""

    def take(self, model: GemmaForCausalLM, batch: int, max_length: int) -> Decoder:
        """One that fits, for this caller alone until it is given back."""
        kept = self.pop(bucket_of(batch), None)
        if kept is not None and kept.fits(model, max_length):
            return kept
        del kept  # its memory first
        return Decoder(model, batch, max_length)

    def give_back(self, decoder: Decoder) -> None:
        self[decoder.cache.batch] = decoder

    def __deepcopy__(self, memo: dict[int, Any]) -> Decoders:
        return Decoders()

    def __reduce__(self) -> tuple[type[Decoders], tuple[()]]:
        return Decoders, ()


def bucket_of(batch: int) -> int:
    return 1 << (batch - 1).bit_length()
