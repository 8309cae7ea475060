"""Decoder: one cache, and the step that adds a token to each of its sequences.

    prompt → prefill → token → step → token → step → …

On a GPU the step is captured in a CUDA graph, embedding to choice, and then replayed: the host
launches one thing a token. The first step of a kind runs as it is, so that its kernels are
compiled; the second is captured. What may differ between replays, tokens so far, positions,
temperature and seed, lies on the device.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma_fast.engine.sampling import Sampling
from gemma_fast.memory import out_of_memory
from gemma_fast.model.cache import KVCache

if TYPE_CHECKING:
    from gemma_fast.causal_lm import GemmaForCausalLM

# Prompts are read in chunks of this many tokens, of all rows, which bounds what activations take.
PREFILL_CHUNK = 2048
ROUND_UP = 256  # tokens: a slightly longer text needs no new cache, and no new graph
MAX_GRAPHS = 8  # of a decoder: one for each way to choose
_capturing = threading.Lock()


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
        self._weights = _addresses(model)
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
        self._warm: set[Hashable] = set()  # graph keys of steps that ran
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._graph_bytes, self.capture_seconds = 0, 0.0

    def fits(self, model: GemmaForCausalLM, max_length: int) -> bool:
        """Whether it is for this model as it is now, and for texts of this length."""
        return self._weights == _addresses(model) and max_length <= self.cache.max_length

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
        if len(ids) > self.cache.batch:
            raise ValueError(f"{len(ids)} texts do not fit a decoder for {self.cache.batch}")
        self._sampling = sampling or Sampling()
        self._seed.fill_(seed)
        self._temperature.fill_(self._sampling.temperature)
        self._rows = len(ids)
        self._token.zero_()
        self.cache.clear()
        if self._sampling.penalises:
            if not self._seen.numel():
                with torch.inference_mode(False):
                    vocab = self.model.config.vocab_size
                    self._seen = self._seen.new_zeros(len(self._token), vocab)
            self._seen.zero_()
        self.extend(ids, attention_mask)

    def extend(self, ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Reads more of the texts, ids :: [b, t], in place of `token`, and chooses the next one."""
        part = self.cache.first_rows(self._rows)
        part.reserve(ids.shape[1])
        part.align(ids.shape[1], attention_mask)
        self.cache.stale = "a prompt was not read to its end"
        if self._sampling.penalises:
            self._seen[: self._rows].scatter_(1, ids, True)
        with self._memory_for(f"reading {self._rows} x {ids.shape[1]} tokens"):
            for chunk in ids.split(max(PREFILL_CHUNK // self._rows, 1), dim=1):
                x, residual = self.model.hidden_states(chunk, part)
            self._choose(x[:, -1], residual[:, -1], self._rows)
        self.cache.length, self.cache.stale = part.length, part.stale

    def step(self) -> None:
        """Decodes `token` and chooses the next one."""
        self.cache.reserve(1)
        key = self._sampling.graph_key
        if not self.asynchronous:
            self._step()
        elif key not in self._warm:
            with self._memory_for("a decode step"):
                self._step()
            self._warm.add(key)
        else:
            if key not in self._graphs:
                if len(self._graphs) == MAX_GRAPHS:
                    del self._graphs[next(iter(self._graphs))]  # the oldest
                self._graphs[key] = self._capture()
            self._graphs[key].replay()
            self.cache.length += 1

    def read(self) -> Callable[[], Tensor]:
        """Starts copying `token` to the host → a call that waits for it and gives it: [b]."""
        if not self.asynchronous:
            token = self.token.clone()
            return lambda: token
        host = torch.empty(self._rows, dtype=torch.int64, device="cpu", pin_memory=True)
        host.copy_(self.token, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self._token.device))

        def wait() -> Tensor:
            done.synchronize()
            return host

        return wait

    def memory(self) -> dict[str, int]:
        """Bytes on the device: the cache with what goes with it, and the graphs."""
        beside = [self._seen, *(x for pair in self.cache.angles.values() for x in pair)]
        return {
            "cache": self.cache.nbytes + sum(x.nbytes for x in beside),
            "graph": self._graph_bytes,
        }

    def wait(self) -> None:
        """Returns when the device has done all steps."""
        if self._token.is_cuda:
            torch.cuda.current_stream(self._token.device).synchronize()

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
        start, length, device = time.perf_counter(), self.cache.length, self._token.device
        graph = torch.cuda.CUDAGraph()
        with (
            _capturing,
            self._memory_for("the CUDA graph of a decode step"),
            torch.cuda.device(device),
            # Its end brings the current stream back, also if the capture fails.
            torch.cuda.stream(torch.cuda.current_stream(device)),
        ):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            # By default the stream is the one of the device that captured first.
            stream = _capture_stream(device)
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._step()
            self._graph_bytes += max(torch.cuda.memory_reserved() - before, 0)
        self.cache.length = length  # a capture runs nothing
        self.capture_seconds += time.perf_counter() - start
        return graph

    def _memory_for(self, what: str) -> AbstractContextManager[None]:
        way_out = "a smaller batch, or model.free_memory()"
        return out_of_memory(what, 0, self._token.device, way_out)


class Decoders(dict[int, Decoder]):
    """A model's decoders, by batch, kept for its next texts; copies of the model have none."""

    def take(self, model: GemmaForCausalLM, batch: int, max_length: int) -> Decoder:
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

    def __deepcopy__(self, memo: dict[int, Any]) -> Decoders:
        return Decoders()

    def __reduce__(self) -> tuple[type[Decoders], tuple[()]]:
        return Decoders, ()


def bucket_of(batch: int) -> int:
    """1, 2, 4, 8, and above a multiple of 8."""
    return 1 << (batch - 1).bit_length() if batch <= 8 else -(-batch // 8) * 8


def _addresses(model: GemmaForCausalLM) -> list[int]:
    """Where the weights lie: a graph reads them there."""
    return [weight.data_ptr() for weight in model.parameters()]


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
