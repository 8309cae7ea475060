"""The benchmarked model and its cases, with the minimum number of bytes and FLOPs of each case.

A case is one test of a model's speed: prefill (pp) or decode (tg) of a number of tokens. Its depth
is the number of tokens that are already in the cache.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from gemma_fast.benchmarks.measure.machine import Work, visible_pairs
from gemma_fast.checkpoint.base import EMBEDDING, HEAD, Checkpoint
from gemma_fast.checkpoint.open import open_checkpoint
from gemma_fast.checkpoint.random import RandomCheckpoint
from gemma_fast.config import GemmaConfig
from gemma_fast.demo import demo_checkpoint
from gemma_fast.presets import PRESETS

PROMPT, NEW = "pp", "tg"
TINY = GemmaConfig(
    model_type="gemma3", vocab_size=199, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, intermediate_size=88, max_position_embeddings=16384,
    query_pre_attn_scalar=20, sliding_window=8, sliding_window_pattern=2,
)  # fmt: skip


def find(model: str) -> Checkpoint:
    """Opens the checkpoint of a model.

    model: `tiny` or a preset (both with random weights), `demo`, a directory, .gguf file or hub id

    Raises ValueError for a name that has two meanings, and the errors of open_checkpoint.
    """
    if model in (*(presets := {"tiny": TINY, **PRESETS}), "demo") and Path(model).exists():
        meaning = "the demo weights" if model == "demo" else "a size with random weights"
        raise ValueError(
            f"--model {model} means {meaning}, but there is also a path {model}: write ./{model}"
            " for the path, or run the command in another folder"
        )
    if model in presets:
        return RandomCheckpoint(presets[model], name=model)
    return open_checkpoint(demo_checkpoint() if model == "demo" else model)


@dataclass(frozen=True)
class Case:
    """Prefill (pp) or decode (tg) of `tokens` tokens, after `depth` tokens, in each of `batch`
    sequences."""

    kind: str
    tokens: int
    depth: int = 0
    batch: int = 1

    @property
    def name(self) -> str:
        return f"{self.kind}{self.tokens}" + (f" @ d{self.depth}" if self.depth else "")

    @property
    def before(self) -> int:
        """Returns the number of tokens in the cache when timing starts: at least one for tg."""
        return max(self.depth, 1) if self.kind == NEW else self.depth

    @property
    def room(self) -> int:
        return self.before + self.tokens

    def status(self, config: GemmaConfig) -> str:
        """Returns the case's status before it is run: "ok" if its tokens fit the context."""
        if self.room <= config.max_position_embeddings:
            return "ok"
        return f"cannot: {self.room} tokens exceed the context of {config.max_position_embeddings}"

    def work(self, config: GemmaConfig, itemsize: int) -> Work:
        """Returns the minimum bytes and FLOPs of the case: one forward pass over all tokens (pp),
        or one pass per token (tg)."""
        if self.kind == PROMPT:
            return pass_work(config, itemsize, self.batch, self.depth, self.tokens)
        steps = range(self.before, self.room)
        works = [pass_work(config, itemsize, self.batch, depth, 1) for depth in steps]
        return Work(*map(sum, zip(*works, strict=True)))


def cases(
    prompts: Sequence[int], new: Sequence[int], depths: Sequence[int], batches: Sequence[int]
) -> list[Case]:
    """Returns a case for every combination of the values, but no case for 0 tokens."""
    kinds = [(PROMPT, n) for n in prompts if n] + [(NEW, n) for n in new if n]
    return [Case(*kind, depth, batch) for batch, depth, kind in product(batches, depths, kinds)]


def pass_work(config: GemmaConfig, itemsize: int, batch: int, depth: int, tokens: int) -> Work:
    """Returns the work of a forward pass over `tokens` new tokens in each of `batch` sequences,
    after `depth` tokens.

    Each weight is read once and takes 2 FLOPs per new token, except that of the output projection,
    which takes FLOPs only for the last token's logits. The lookup of embeddings is not counted.
    Attention takes 4 FLOPs per layer, query head, channel and visible (query, key) pair. Old keys
    and values that a new token sees are read once; new keys and values that a later token may see
    are written once. Layers that read an earlier layer's keys and values write none, and compute
    the last token only.
    """
    gathered = config.hidden_size_per_layer_input * config.num_hidden_layers  # per token
    bytes_read, flops = batch * tokens * gathered, 0
    for name, shape in config.tensor_shapes().items():
        size = math.prod(shape)
        tied = name == EMBEDDING and config.tie_word_embeddings
        if tied or name == HEAD:
            bytes_read, flops = bytes_read + size, flops + 2 * size
        elif name not in (EMBEDDING, "model.embed_tokens_per_layer.weight"):
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            computed = _computed(config, int(layer[1]), tokens) if layer else tokens
            bytes_read, flops = bytes_read + size, flops + 2 * size * computed
    for i, layer in enumerate(config.layers):
        n, d, limit = layer.num_key_value_heads, layer.head_dim, layer.window or depth + tokens
        positions = min(depth, limit - 1)
        if layer.kv_layer == i:
            positions += min(tokens, limit)
        elif tokens > 1:
            positions = min(depth + tokens, limit)
        bytes_read += batch * 2 * n * d * positions
        before = depth + tokens - _computed(config, i, tokens)
        pairs = visible_pairs(depth + tokens, layer.window) - visible_pairs(before, layer.window)
        flops += 4 * config.num_attention_heads * d * pairs
    return Work(bytes_read * itemsize, batch * flops)


def _computed(config: GemmaConfig, layer: int, tokens: int) -> int:
    """Returns how many of the new tokens a layer computes, if one token's logits are needed."""
    return tokens if config.layers[layer].kv_layer == layer else 1
