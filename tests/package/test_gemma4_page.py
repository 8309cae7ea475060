"""Compares the table of sizes in docs/gemma4.md with the configs of the published models."""

import math
from pathlib import Path

import torch

from gemma_fast.checkpoint.base import PER_LAYER_EMBEDDING
from gemma_fast.checkpoint.random import RandomCheckpoint
from gemma_fast.checkpoint.rounded import with_quantize
from gemma_fast.model.cache import BLOCK, KVCache
from gemma_fast.model.gemma import Gemma
from gemma_fast.model.packing import pack_weights
from gemma_fast.presets import PRESETS
from gemma_fast.walkthrough.cost import BF16, bytes_of_a_token

PAGE = Path(__file__).resolve().parents[2] / "docs/gemma4.md"
KIB, MIB = 2**10, 2**20


def cache_bytes(config, tokens: int) -> int:
    return KVCache.bytes_needed(config, 1, tokens, torch.bfloat16)


def int4_bytes(config) -> int:
    """Returns the bytes of the weights if quantize="int4" packs them."""
    checkpoint = with_quantize(RandomCheckpoint(config), "int4")
    packings = {name: checkpoint.packing(name) for name in checkpoint.shapes}
    with torch.device("meta"):
        model = Gemma(config).bfloat16()
        pack_weights(model, packings, torch.device("cuda"), "random weights")
    return sum(x.nbytes for x in model.parameters())


def column(name: str) -> list[str]:
    """Returns what the table must say about a model, from the second row on."""
    config, layers = PRESETS[name], PRESETS[name].layers
    window, full = ([x for x in layers if bool(x.window) == kind] for kind in (True, False))
    table = math.prod(config.tensor_shapes().get(PER_LAYER_EMBEDDING, (0,)))
    tokens = 512 * BLOCK  # longer than all windows
    per_token = (cache_bytes(config, tokens + BLOCK) - cache_bytes(config, tokens)) / BLOCK
    rings = cache_bytes(config, tokens) - tokens * per_token
    widths = sorted({x.intermediate_size for x in layers})
    return [
        f"{len(window)} + {len(full)}",
        str(sum(x.kv_layer == i for i, x in enumerate(layers))),
        str(config.hidden_size),
        str(config.num_attention_heads),
        f"{window[0].num_key_value_heads} / {full[0].num_key_value_heads}",
        ", ".join(map(str, widths)),
        f"{config.num_experts} × {config.moe_intermediate_size}" if config.num_experts else "0",
        str(config.top_k_experts),
        str(config.sliding_window),
        str(config.max_position_embeddings),
        f"{config.num_parameters / 1e9:.2f} B",
        f"{BF16 * config.num_parameters / 1e9:.2f} GB",
        f"{int4_bytes(config) / 1e9:.2f} GB",
        f"{BF16 * table / 1e9:.2f} GB" if table else "0",
        f"{sum(bytes_of_a_token(config, 0).values()) / 1e9:.2f} GB",
        f"{per_token / KIB:g} KiB",
        f"{rings / MIB:g} MiB",
    ]


def test_sizes_are_those_of_the_configs():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| name in `PRESETS`"))
    rows = [[x.strip() for x in line.split("|")[2:-1]] for line in lines[start:]]
    rows = rows[: rows.index([])]
    names = [name for name in PRESETS if name.startswith("gemma-4")]
    assert rows[0] == names
    for i, name in enumerate(names):
        assert [row[i] for row in rows[1:]] == column(name)


def test_savings_are_those_of_the_configs():
    """Shares of the KV cache that layers without K and V save, and megabytes of weights."""
    text = PAGE.read_text(encoding="utf-8")
    shares, values, updates = [], [], []
    for config in (PRESETS[name] for name in PRESETS if name.startswith("gemma-4")):
        sizes = [x.num_key_value_heads * x.head_dim * (x.window or 8192) for x in config.layers]
        shared = sum(n for i, n in enumerate(sizes) if config.layers[i].kv_layer != i)
        shares.append(f"{100 * shared / sum(sizes):.0f} %")
        v_proj = sum(x.num_key_value_heads * x.head_dim for x in config.layers if x.k_eq_v)
        values.append(f"{BF16 * v_proj * config.hidden_size / 1e6:.0f} MB")
        updates.append(f"{bytes_of_a_token(config, 0).get('per-layer embeddings', 0) / 1e6:.0f} MB")
    assert f"saves {shares[0]} and {shares[1]} of the KV cache" in text
    large = f"{values[2]} of 12B, {values[3]} of 26B-A4B, {values[4]} of 31B"
    assert f"saves `v_proj`: {large}" in text
    assert f"with W, {updates[0]} and {updates[1]} of weights per token" in text
