"""`Decoder` has one KV cache, and a decode step that adds one token to each row of the cache.

    prompt → prefill → token → step → token → step → …

On a GPU the step, from embedding to sampling, is captured in a CUDA graph and then replayed, so the
host launches one graph per token. For each number of rows and each `graph_key` of the sampler, the
first step runs without a graph, because it compiles kernels. The second step is captured.
Everything that changes between replays is stored in device tensors: tokens, positions, and the
sampling settings of each row. A step that calls a `Processor` is not captured. On a CPU, the
layers' C calls are recorded and repeated in the same way, see kernels/cpu/replay.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from gemma_fast.engine.graphs import StepGraphs
from gemma_fast.engine.host_copy import copy_to_host
from gemma_fast.engine.sampler import Processor, Sampler
from gemma_fast.engine.sampling import Sampling
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
# Logits of the model and processed logits :: [b, vocab], fp32, of each new token.
Record = list[tuple[Tensor, Tensor]]


class Decoder:
    """Decodes up to `batch` sequences of up to `max_length` tokens.

    cache         KVCache, whose batch is rounded up by `bucket_of`; unused rows are decoded, too
    token         [b], int64, on the device: the newest token of each row, or -1 if a logit was NaN
                  or inf, or all were -inf. The newest token is not in the cache yet.
    asynchronous  True on a GPU, where `step` returns before the token is computed
    ahead         True if the next step may start before the newest token is read: on a GPU, unless
                  the sampler calls functions of the caller or logits are recorded

    generate() fills all rows at once: `prefill`, then `step`. The scheduler fills them one by one:
    `open`, then `clear_row`, `read_prompt` and `read_last` for a text, and `step` for all texts.
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
        self._record: Record | None = None
        self._caches = {bucket: self.cache}  # number of rows → cache of the first rows
        self._replays: dict[int, Replay] | None = {} if runs_c(model.norm) else None
        self.graphs = StepGraphs(device)

    def fits(self, model: Gemma, max_length: int) -> bool:
        """Returns True if this decoder was created for the model's current weights, and its cache
        has room for max_length tokens."""
        return self._weights == _addresses(model) and max_length <= self.cache.max_length

    @property
    def token(self) -> Tensor:
        return self.sampler.token[self._rows]

    @property
    def ahead(self) -> bool:
        return self.asynchronous and self.sampler.graph_key is not None and self._record is None

    def prefill(
        self, ids: Tensor, attention_mask: Tensor | None = None, texts: Sequence[Sampling] = (),
        processors: Sequence[Processor] = (), record: Record | None = None,
    ) -> None:  # fmt: skip
        """Empties the cache, adds the prompts ids :: [b, t] to it, and samples the first token
        after each prompt.

        attention_mask  [b, t], 0 for padding on the left; None: no padding
        texts           sampling settings of each row; empty: all rows are greedy
        processors      functions that change the logits of all rows; they prevent CUDA graphs
        record          list to which the logits of each new token are appended
        """
        if len(ids) > self.cache.batch:
            raise ValueError(f"a batch of {len(ids)} does not fit a decoder for {self.cache.batch}")
        self._rows, self._record = slice(0, len(ids)), record
        self.cache.clear()
        self.sampler.invariant = False
        self.sampler.set(texts, processors, record is not None)
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
        self._append_record()

    def open(self, invariant: bool = False) -> None:
        """Empties the cache, pauses all rows, and makes them greedy. invariant: see Sampler."""
        self._rows, self._record = slice(0, self.cache.batch), None
        self.cache.clear()
        self.cache.pause()
        self.sampler.invariant = invariant
        self.sampler.set([])

    def clear_row(self, row: int) -> None:
        """Empties a row, pauses it, and makes it greedy."""
        cache = self.cache.rows(row)
        cache.clear()
        cache.pause()
        self.sampler.clear_row(row)

    def read_prompt(self, row: int, ids: Tensor) -> None:
        """Appends ids :: [1, t], a part of a prompt, to a paused row, which remains paused."""
        with self._reading(row, ids) as cache:
            self.model.hidden_states(ids, cache, keep=0)
            cache.pause()

    def read_last(
        self, row: int, ids: Tensor, prompt: Tensor, text: Sampling, keeps_logits: bool = False
    ) -> None:
        """Appends ids :: [1, t], the last part of the prompt :: [1, tokens], which may be on the
        host, to a paused row, and samples the first token after it. Ends the pause."""
        self.sampler.set_row(row, text, prompt, keeps_logits)
        with self._reading(row, ids) as cache:
            self.model.step(ids, cache, self.sampler.rows(slice(row, row + 1)))

    @contextmanager
    def _reading(self, row: int, ids: Tensor) -> Iterator[KVCache]:
        cache, tokens = self.cache.rows(row), ids.shape[1]
        with self._memory_for(f"a prefill of {tokens} tokens"):
            cache.resume()
            cache.reserve(tokens)
            yield cache

    def move_row(self, source: int, target: int) -> None:
        """Moves a text to an empty row."""
        self.cache.rows(target).copy_from(self.cache.rows(source))
        self.sampler.move_row(source, target)
        self.clear_row(source)

    def step(self, rows: int | None = None) -> None:
        """Appends `token` to the first `rows` rows of the cache, by default to all, and samples the
        next token of each of them. rows: a result of `bucket_of`."""
        rows = self.cache.batch if rows is None else rows
        self._cache_of(rows).reserve(1)
        self.sampler.follow(self.sampler.token.unsqueeze(1))
        key = self.sampler.first_rows(rows).graph_key
        if not self.asynchronous or key is None:
            self._step(rows)
        else:
            with self._memory_for("a decode step"):
                step = functools.partial(self._step, rows)
                self.graphs.run((rows, key), step, self._cache_of(rows))
        self._append_record()

    def read(self) -> Callable[[], Tensor]:
        """Starts to copy `token` to the host. Returns a function that waits for the copy, then
        returns the copied tokens :: [b]."""
        return copy_to_host(self.token)[0]

    def release(self) -> None:
        """Waits until the device has finished all steps, and forgets the last texts."""
        self.wait()
        self.sampler.clear()
        self._record = None

    def memory(self) -> dict[str, int]:
        """Returns the bytes on the device: "cache" (KV cache, sampler), "graph" (CUDA graphs)."""
        return {"cache": self.cache.nbytes + self.sampler.nbytes, "graph": self.graphs.nbytes}

    def wait(self) -> None:
        """Waits until the device has finished all steps."""
        if self.token.is_cuda:
            torch.cuda.current_stream(self.token.device).synchronize()

    def _cache_of(self, rows: int) -> KVCache:
        if rows not in self._caches:
            self._caches[rows] = self.cache.rows(slice(0, rows))
        return self._caches[rows]

    def _step(self, rows: int) -> None:
        sampler = self.sampler.first_rows(rows)
        ids = sampler.token.unsqueeze(1)
        sampler.read(ids)
        replay = None if self._replays is None else self._replays.setdefault(rows, Replay())
        self.model.step(ids, self._cache_of(rows), sampler, replay)

    def _append_record(self) -> None:
        if self._record is not None:
            self._record.append(self.sampler.kept(self._rows))

    def _memory_for(self, what: str) -> AbstractContextManager[None]:
        way_out = "a smaller batch, or model.free_memory()"
        return out_of_memory(what, 0, self.token.device, way_out)


def bucket_of(batch: int) -> int:
    """Returns the batch size rounded up to 1, 2, 4, 8 or a multiple of 8."""
    return 1 << (batch - 1).bit_length() if batch <= 8 else -(-batch // 8) * 8


def _addresses(model: Gemma) -> list[int]:
    """Returns the weights' addresses. CUDA graphs read the weights at fixed addresses."""
    return [weight.data_ptr() for weight in model.parameters()]
