"""The benchmarked model and its cases, with the minimum number of bytes and FLOPs of each case.

A case is one test of a model's speed: prefill (pp) or decode (tg) of a number of tokens. Its depth
is the number of tokens that are already in the cache.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma_fast.benchmarks.measure.machine import Work, visible_pairs
from gemma_fast.checkpoint.base import EMBEDDING, HEAD, PER_LAYER_EMBEDDING, Checkpoint
from gemma_fast.checkpoint.open import open_checkpoint
from gemma_fast.checkpoint.random import RandomCheckpoint
from gemma_fast.config import GemmaConfig
from gemma_fast.demo import demo_checkpoint
from gemma_fast.presets import PRESETS

PROMPT, NEW, ARRIVAL = "pp", "tg", "arrival"  # kinds; see arrival.py for the last
Count = int | tuple[int, int]  # tokens, or (tokens, depth)
# Tensor → bytes per weight, its scales included. A tensor without an entry takes `itemsize`.
Sizes = Mapping[str, float]
NO_SIZES: Sizes = {}
TINY = GemmaConfig(
    model_type="gemma3", vocab_size=199, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, intermediate_size=88, max_position_embeddings=16384,
    query_pre_attn_scalar=20, sliding_window=8, sliding_window_pattern=2,
)  # fmt: skip


def find(model: str) -> Checkpoint:
    """Opens the checkpoint of a model.

    model: `tiny` or a preset (both with random weights), `demo`, a directory, .gguf file or hub id

    Raises ValueError for a name that has two meanings, FileNotFoundError for a name that has none,
    and the errors of open_checkpoint.
    """
    if model in (*(presets := {"tiny": TINY, **PRESETS}), "demo") and Path(model).exists():
        meaning = "the demo weights" if model == "demo" else "a size with random weights"
        raise ValueError(
            f"--model {model} means {meaning}, but there is also a path {model}: write ./{model}"
            " for the path, or run the command in another folder"
        )
    if model in presets:
        return RandomCheckpoint(presets[model], name=model)
    if model != "demo" and "/" not in model and not Path(model).exists():
        raise FileNotFoundError(
            f"--model {model} is not a path, a hub id (owner/name), demo or a size with random"
            f" weights: {', '.join(presets)}"
        )
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
    def total(self) -> int:
        """Returns the number of tokens that a rate counts."""
        return self.batch * self.tokens

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

    def work(self, config: GemmaConfig, itemsize: int, sizes: Sizes = NO_SIZES) -> Work:
        """Returns the minimum bytes and FLOPs of the case: one forward pass over all tokens (pp),
        or one pass per token (tg)."""
        if self.kind == PROMPT:
            return pass_work(config, itemsize, self.batch, self.depth, self.tokens, sizes)
        steps = range(self.before, self.room)
        weights = weights_work(config, itemsize, self.batch, 1, sizes)
        works = [attention_work(config, itemsize, self.batch, depth, 1) for depth in steps]
        return Work(*(sum(x, len(steps) * w) for *x, w in zip(*works, weights, strict=True)))


def cases(
    prompts: Sequence[Count], new: Sequence[Count], depths: Sequence[int], batches: Sequence[int]
) -> list[Case]:
    """Returns a case for every combination of the values, but no case for 0 tokens. A count with a
    depth of its own, (tokens, depth), is not combined with `depths`."""
    kinds = [(PROMPT, n) for n in prompts] + [(NEW, n) for n in new]
    found = [(kind, n, d) for d in depths for kind, n in kinds if isinstance(n, int)]
    found += [(kind, *n) for kind, n in kinds if not isinstance(n, int)]
    return [Case(*case, batch) for batch in batches for case in found if case[1]]


def pass_work(
    config: GemmaConfig, itemsize: int, batch: int, depth: int, tokens: int,
    sizes: Sizes = NO_SIZES,
) -> Work:  # fmt: skip
    """Returns the work of a forward pass over `tokens` new tokens in each of `batch` sequences,
    after `depth` tokens.

    itemsize: bytes of a number in the cache, and of a weight that is not in `sizes`

    Each weight is read once and takes 2 FLOPs per new token, with two exceptions. The output
    projection takes FLOPs only for the last token's logits. Of the experts, `experts_read` are
    read, and a token takes the FLOPs of its own.

    The lookup of embeddings is not counted, but that of per-layer embeddings is: it is a row of all
    layers' width. Attention takes 4 FLOPs per layer, query head, channel and visible (query, key)
    pair. Old keys and values that a new token sees are read once; new keys and values that a later
    token may see are written once. A layer that reads an earlier layer's keys and values writes
    none. It computes the last token only, and reads the keys and values that this token sees.
    """
    weights = weights_work(config, itemsize, batch, tokens, sizes)
    attention = attention_work(config, itemsize, batch, depth, tokens)
    return Work(weights.bytes + attention.bytes, weights.flops + attention.flops)


def attention_work(config: GemmaConfig, itemsize: int, batch: int, depth: int, tokens: int) -> Work:
    """Returns the part of `pass_work` that is not of weights."""
    elements, flops, end = 0, 0, depth + tokens
    for i, layer in enumerate(config.layers):
        limit, own = layer.window or end, layer.kv_layer == i
        positions = min(depth, limit - 1) + min(tokens, limit) if own else min(end, limit)
        elements += batch * 2 * layer.num_key_value_heads * layer.head_dim * positions
        computed = tokens if own else 1
        pairs = visible_pairs(end, layer.window) - visible_pairs(end - computed, layer.window)
        flops += 4 * config.num_attention_heads * layer.head_dim * pairs
    return Work(elements * itemsize, batch * flops)


def weights_work(config: GemmaConfig, itemsize: int, batch: int, tokens: int, sizes: Sizes) -> Work:
    """Returns the part of `pass_work` that is of weights, with the rows of embeddings."""
    computed = [tokens if x.kv_layer == i else 1 for i, x in enumerate(config.layers)]
    gathered = batch * config.hidden_size_per_layer_input * sum(computed)
    size, flops = gathered * sizes.get(PER_LAYER_EMBEDDING, itemsize), 0.0
    for name, shape in config.tensor_shapes().items():
        parts = [tokens]  # for equal parts of the weight, the tokens that are multiplied by it
        read = used = 1.0  # shares of the experts: that the batch reads, that a token uses
        if name == (EMBEDDING if config.tie_word_embeddings else HEAD):
            parts = [1]
        elif name in (EMBEDDING, PER_LAYER_EMBEDDING):
            parts = []
        elif name == "model.per_layer_model_projection.weight":
            parts = [*computed]
        elif layer := re.match(r"model\.layers\.(\d+)\.", name):
            parts = [computed[int(layer[1])]]
            if ".experts." in name:
                read = experts_read(config, batch * parts[0]) / config.num_experts
                used = config.top_k_experts / config.num_experts
        part = math.prod(shape) // max(len(parts), 1)
        size += part * len(parts) * sizes.get(name, itemsize) * read
        flops += 2 * part * sum(parts) * used
    return Work(size, batch * flops)


def experts_read(config: GemmaConfig, tokens: int) -> float:
    """Returns the expected number of a layer's experts that `tokens` tokens choose together:

        E * (1 - (1 - k / E)^tokens)

    if each token chooses any k = top_k_experts of the E = num_experts with the same probability.
    """
    experts, top_k = config.num_experts, config.top_k_experts
    return experts * (1 - (1 - top_k / experts) ** tokens)


def weights_bytes(config: GemmaConfig, itemsize: int, sizes: Sizes) -> float:
    """Returns the bytes of all weights."""
    shapes = config.tensor_shapes().items()
    return sum(math.prod(shape) * sizes.get(name, itemsize) for name, shape in shapes)


def is_packed(checkpoint: Checkpoint) -> bool:
    return any(checkpoint.packing(name) for name in checkpoint.shapes)
