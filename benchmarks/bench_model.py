"""Prefill and decode of a whole model: this project's, the eager reference, and transformers'.

    python -m benchmarks model                    # Gemma 2B with random weights, on a GPU
    python -m benchmarks model --model demo       # the demo weights, also on a CPU

All are called alike, `model(ids, past_key_values=…)`. Not all can be captured in a CUDA graph, so
they are timed by a synchronised clock, in turns. The oracle is the reference in the run's dtype
(random weights are drawn in it): what differs is rounding, over as many layers as there are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_attention import visible_pairs
from benchmarks.harness import EAGER, OURS, Call, Suite
from benchmarks.machine import Work
from gemma_fast.checkpoint import Checkpoint, open_checkpoint
from gemma_fast.config import PRESETS, GemmaConfig
from gemma_fast.demo import demo_checkpoint
from gemma_fast.load import RandomCheckpoint
from gemma_fast.model import GemmaForCausalLM
from gemma_fast.reference import Reference

Model = Callable[..., Any]

TINY = GemmaConfig(
    model_type="gemma3", vocab_size=199, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, intermediate_size=88, max_position_embeddings=16384,
    query_pre_attn_scalar=20, sliding_window=8, sliding_window_pattern=2,
)  # fmt: skip


@cache
def find(model: str) -> Checkpoint:
    """`tiny` or a preset's name: random weights; `demo`; else a directory, .gguf file or hub id."""
    if model in (presets := {"tiny": TINY, **PRESETS}):
        return RandomCheckpoint(presets[model], name=model)
    return open_checkpoint(demo_checkpoint() if model == "demo" else model)


def _transformers(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Model:
    from benchmarks.rivals import transformers_model

    if checkpoint.config.attn_logit_softcapping:
        raise NotImplementedError("no soft cap")
    return transformers_model(checkpoint, "sdpa", dtype=dtype, device=device)


LOADERS: dict[str, Callable[..., Model]] = {
    EAGER: Reference.from_checkpoint,
    "transformers (sdpa)": _transformers,
    OURS: GemmaForCausalLM.from_checkpoint,
}


@lru_cache(maxsize=len(LOADERS))  # they are large: one of each
def load(model: str, dtype: torch.dtype, device: torch.device, provider: str) -> Model:
    return LOADERS[provider](find(model), dtype=dtype, device=device)


def inputs(
    device: torch.device, dtype: torch.dtype, model: str, phase: str, tokens: int
) -> tuple[Any, ...]:
    """How to load a provider's model, the phase, ids :: [1, tokens + 1]"""
    ids = torch.randint(3, find(model).config.vocab_size, (1, tokens + 1)).to(device)
    return partial(load, model, dtype, device), phase, ids


def prefill(model: Model, ids: Tensor) -> Call:
    """All but the last token, into a new cache."""
    return lambda: model(ids[:, :-1], use_cache=True, logits_to_keep=1).logits


def decode(model: Model, ids: Tensor) -> Call:
    """The last token after all before it; each further call is one more, over a longer cache."""
    past = model(ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values

    def step() -> Tensor:
        nonlocal past
        out = model(ids[:, -1:], past_key_values=past, use_cache=True, logits_to_keep=1)
        past = out.past_key_values
        return out.logits

    return step


PHASES = {"prefill": prefill, "decode": decode}


def run(provider: str, load: Callable[[str], Model], phase: str, ids: Tensor) -> Call:
    return PHASES[phase](load(provider), ids)


def work(itemsize: int, model: str, phase: str, tokens: int) -> Work:
    """Each weight is read once, and 2 FLOPs a token; but of the embedding only the last token's
    logits, and its row for each token, which is not counted. Attention: 4 FLOPs a head, channel and
    visible pair, on each layer. Keys and values are written (prefill), or read (decode), once."""
    config = find(model).config
    weights, embedding = config.num_parameters, config.vocab_size * config.hidden_size
    heads, n, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    windows = [config.window(i) for i in range(config.num_hidden_layers)]
    held = sum(min(tokens, window or tokens) for window in windows)  # positions, of all layers
    if phase == "prefill":
        pairs = sum(visible_pairs(tokens, window) for window in windows)
        products = 2 * (tokens * (weights - embedding) + embedding)
    else:
        pairs, products = held, 2 * weights
    return Work((weights + 2 * n * d * held) * itemsize, products + 4 * heads * d * pairs)


def model_suite(model: str, prompts: tuple[int, ...] = (512, 8192)) -> Suite:
    """A suite of one model: prefill of each prompt, and decode after 512 tokens."""
    phases = [("prefill", tokens) for tokens in prompts] + [("decode", 512)]
    providers = {name: partial(run, name) for name in LOADERS}
    return Suite(
        name="model",
        about="A whole model, called eagerly: prefill of a prompt, a token after it; batch 1",
        yardstick=False,
        sizes={
            f"{model}, {phase} {tokens}": {"model": model, "phase": phase, "tokens": tokens}
            for phase, tokens in phases
        },
        tiny={
            f"tiny, {phase} 20": {"model": "tiny", "phase": phase, "tokens": 20} for phase in PHASES
        },
        inputs=inputs,
        oracle=lambda *inputs: providers[EAGER](*inputs)(),
        work=work,
        # Without rotary embedding it is 0.46; by rounding 0.03 (Gemma 2B), 0.048 (Gemma 3 270M).
        tolerance={torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 1e-4},
        providers=providers,
        clock="wall",
    )


MODEL = model_suite("gemma-2b")
