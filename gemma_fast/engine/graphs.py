"""`StepGraphs` captures decode steps as CUDA graphs, and replays them."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Hashable
from typing import Any

import torch

from gemma_fast.model.cache import KVCache

MAX_GRAPHS = 256  # the one that was not used for the longest time is dropped
_capturing = threading.Lock()


class StepGraphs:
    """The CUDA graphs of a decoder's steps, by key. A key stands for the launches of a step.

    nbytes           memory of all graphs on the device. They share that of intermediate tensors
    capture_seconds  time of all captures
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.nbytes, self.capture_seconds = device, 0, 0.0
        self._warm: set[Hashable] = set()  # keys of steps that have run
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    def run(self, key: Hashable, step: Callable[[], None], cache: KVCache) -> None:
        """Runs a step that adds one token to each row of `cache`. The first step of a key runs
        without a graph, because it compiles kernels. The second is captured, and then replayed."""
        if key not in self._warm:
            step()
            self._warm.add(key)
            return
        graph = self._graphs.pop(key, None)
        if graph is not None:
            cache.count(1)
        else:
            if len(self._graphs) == MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            graph = self.capture(step, cache)
        self._graphs[key] = graph  # the last one: used most recently
        graph.replay()

    def capture(self, step: Callable[[], None], cache: KVCache) -> torch.cuda.CUDAGraph:
        """Captures a step, which the caller must replay.

        The capture increases the token counts of `cache` on the host, but computes no token.
        """
        start, graph = time.perf_counter(), torch.cuda.CUDAGraph()
        with (
            _capturing,
            torch.cuda.device(self.device),
            # This context restores the current stream, even if the capture fails.
            torch.cuda.stream(torch.cuda.current_stream(self.device)),
        ):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            # PyTorch's default capture stream is on the first device that captured a graph, which
            # may be another device.
            stream = _capture_stream(self.device)
            # Graphs run one after another, and keep results in the cache and the sampler only, so
            # they can share the memory of all other tensors.
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            with torch.cuda.graph(
                graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
            ):
                step()
            self.nbytes += max(torch.cuda.memory_reserved() - before, 0)
        self.capture_seconds += time.perf_counter() - start
        return graph


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
