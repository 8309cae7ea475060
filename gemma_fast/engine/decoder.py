"""`Decoder` has one KV cache, and a decode step that adds one token to each row of the cache.

    prompt → prefill → token → step → token → step → …

On a GPU the step, from embedding to sampling, is captured in a CUDA graph and then replayed, so the
host launches one graph per token. For each `graph_key` of the sampler, the first step runs without
a graph, because it compiles kernels. The second step is captured. Everything that changes between
replays is stored in device tensors: tokens, positions, and the sampling settings of each row. A
step that calls a `Processor` or keeps its logits is not captured. On a CPU, the layers' C calls are
recorded and repeated in the same way, see kernels/cpu/replay.py.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from gemma_fast.engine.sampling import Processor, Record, Sampler, Sampling
from gemma_fast.kernels.cpu.calls import runs_c
from gemma_fast.kernels.cpu.replay import Replay
from gemma_fast.memory import out_of_memory
from gemma_fast.model.cache import KVCache
from gemma_fast.model.gemma import Gemma

# Prefill runs in chunks of this many tokens, summed over all rows, to limit activation memory.
PREFILL_CHUNK = 2048
# Cache lengths are rounded up to a multiple of ROUND_UP tokens, so a slightly longer text does not
# need a new cache or graph.
ROUND_UP = 256
MAX_GRAPHS = 8  # maximum graphs per decoder; each `graph_key` of its sampler has its own graph
_capturing = threading.Lock()


class Decoder:
    """Decodes up to `batch` sequences of up to `max_length` tokens.

    cache         KVCache, whose batch is rounded up by `bucket_of`; unused rows are decoded, too
    token         [b], int64, on the device: the newest token of each row, or -1 if a logit was NaN
                  or inf, or all were -inf. The newest token is not in the cache yet.
    asynchronous  True on a GPU, where `step` returns before the token is computed
    ahead         True if the next step may start before the newest token is read: on a GPU, unless
                  the sampler calls functions of the caller or keeps logits
    """

    def __init__(self, model: Gemma, batch: int, max_length: int) -> None:
        self.model = model
        self._weights = _addresses(model)
        length = min(-(-max_length // ROUND_UP) * ROUND_UP, model.config.max_position_embeddings)
        bucket, device = bucket_of(batch), model.device
        size = KVCache.bytes_needed(model.config, bucket, length, model.dtype)
        # A tensor that is created in inference mode cannot be changed in place outside that mode.
        with (
            torch.inference_mode(False),
            out_of_memory(
                f"a KV cache for {bucket} sequences of {length} tokens", size, device,
                "a smaller batch, shorter prompts or a smaller max_new_tokens",
            ),
        ):  # fmt: skip
            self.cache = model.new_cache(bucket, length)
            self.sampler = Sampler(bucket, model.config.vocab_size, device)
        self.asynchronous = device.type == "cuda"
        self._rows = slice(0, batch)
        self._warm: set[Hashable] = set()  # graph keys of steps that have run
        self._replay = Replay() if runs_c(model.norm) else None
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._graph_bytes, self.capture_seconds = 0, 0.0

    def fits(self, model: Gemma, max_length: int) -> bool:
        """Returns True if this decoder was created for the model's current weights, and its cache
        has room for max_length tokens."""
        return self._weights == _addresses(model) and max_length <= self.cache.max_length

    @property
    def token(self) -> Tensor:
        return self.sampler.token[self._rows]

    @property
    def ahead(self) -> bool:
        return self.asynchronous and self.sampler.graph_key is not None

    def prefill(
        self, ids: Tensor, attention_mask: Tensor | None = None, texts: Sequence[Sampling] = (),
        processors: Sequence[Processor] = (), record: Record | None = None,
    ) -> None:  # fmt: skip
        """Empties the cache, adds the prompts ids :: [b, t] to it, and samples the first token
        after each prompt.

        attention_mask  [b, t], 0 for padding on the left; None: no padding
        texts           sampling settings of each row; empty: all rows are greedy
        processors      functions that change the logits of all rows; they prevent CUDA graphs
        record          list to which the logits of each new token are appended; it prevents CUDA
                        graphs, too
        """
        if len(ids) > self.cache.batch:
            raise ValueError(f"a batch of {len(ids)} does not fit a decoder for {self.cache.batch}")
        self._rows = slice(0, len(ids))
        self.cache.clear()
        self.sampler.set(texts, processors, record)
        self.extend(ids, attention_mask)

    def extend(self, ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Appends ids :: [b, t] to the rows of the cache, and samples the next token of each row.

        Discards the current `token`, which is not in the cache yet.
        """
        b, t = ids.shape
        self.sampler.follow(ids)
        cache, sampler = self.cache.rows(self._rows), self.sampler.rows(self._rows)
        cache.reserve(t)
        cache.align(t, attention_mask)
        *chunks, last = ids.split(max(PREFILL_CHUNK // b, 1), dim=1)
        with (
            cache.unfinished("the prefill of a prompt did not finish"),
            self._memory_for(f"a prefill of {b} x {t} tokens"),
        ):
            sampler.read(ids, attention_mask)
            for chunk in chunks:
                self.model.hidden_states(chunk, cache, keep=0)
            self.model.step(last, cache, sampler)

    def step(self) -> None:
        """Appends `token` to the rows of the cache, and samples the next token of each row."""
        self.cache.reserve(1)
        self.sampler.follow(self.sampler.token.unsqueeze(1))
        key = self.sampler.graph_key
        if not self.ahead:
            self._step()
        elif key not in self._warm:
            with self._memory_for("a decode step"):
                self._step()
            self._warm.add(key)
        else:
            if key in self._graphs:
                self.cache.count(1)
            else:
                if len(self._graphs) == MAX_GRAPHS:
                    del self._graphs[next(iter(self._graphs))]  # the oldest graph
                self._graphs[key] = self._capture()
            self._graphs[key].replay()

    def read(self) -> Callable[[], Tensor]:
        """Starts to copy `token` to the host. Returns a function that waits for the copy, then
        returns the copied tokens :: [b]."""
        if not self.asynchronous:
            token = self.token.clone()
            return lambda: token
        host = torch.empty(self.token.shape, dtype=torch.int64, device="cpu", pin_memory=True)
        host.copy_(self.token, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.token.device))

        def wait() -> Tensor:
            done.synchronize()
            return host

        return wait

    def memory(self) -> dict[str, int]:
        """Returns the bytes on the device: "cache" (KV cache, sampler), "graph" (CUDA graphs)."""
        return {"cache": self.cache.nbytes + self.sampler.nbytes, "graph": self._graph_bytes}

    def wait(self) -> None:
        """Waits until the device has finished all steps."""
        if self.token.is_cuda:
            torch.cuda.current_stream(self.token.device).synchronize()

    def _step(self) -> None:
        ids = self.sampler.token.unsqueeze(1)
        self.sampler.read(ids)
        self.model.step(ids, self.cache, self.sampler, self._replay)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Captures the step as a CUDA graph, which the caller must replay.

        The capture increases the token counts of the cache on the host, but computes no token.
        """
        start, device = time.perf_counter(), self.token.device
        graph = torch.cuda.CUDAGraph()
        with (
            _capturing,
            self._memory_for("the CUDA graph of a decode step"),
            torch.cuda.device(device),
            # This context restores the current stream, even if the capture fails.
            torch.cuda.stream(torch.cuda.current_stream(device)),
        ):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            # PyTorch's default capture stream is on the first device that captured a graph, which
            # may be another device.
            stream = _capture_stream(device)
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._step()
            self._graph_bytes += max(torch.cuda.memory_reserved() - before, 0)
        self.capture_seconds += time.perf_counter() - start
        return graph

    def _memory_for(self, what: str) -> AbstractContextManager[None]:
        way_out = "a smaller batch, or model.free_memory()"
        return out_of_memory(what, 0, self.token.device, way_out)


def bucket_of(batch: int) -> int:
    """Returns the batch size rounded up to 1, 2, 4, 8 or a multiple of 8."""
    return 1 << (batch - 1).bit_length() if batch <= 8 else -(-batch // 8) * 8


def _addresses(model: Gemma) -> list[int]:
    """Returns the weights' addresses. CUDA graphs read the weights at fixed addresses."""
    return [weight.data_ptr() for weight in model.parameters()]


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
