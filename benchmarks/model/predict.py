"""Predicts the time of a decode step on an H100 from its bytes and launches. Measures nothing.

python -m benchmarks.model.predict    # prints the tables of docs/benchmarks.md
"""

from __future__ import annotations

import math
from itertools import product

import click

from gemma_fast.benchmarks.measure.report import table
from gemma_fast.benchmarks.model.cases import NO_SIZES, Sizes, experts_read, pass_work
from gemma_fast.checkpoint.random import RandomCheckpoint
from gemma_fast.checkpoint.rounded import RoundedCheckpoint
from gemma_fast.config import FULL, SLIDING, GemmaConfig
from gemma_fast.presets import PRESETS

MODELS = (
    "gemma-4-e2b", "gemma-4-e4b", "gemma-4-12b", "gemma-4-26b-a4b", "gemma-4-31b", "gemma-2b",
    "gemma-3-12b",
)  # fmt: skip
CONTEXTS = (1024, 8192)  # tokens, the new one included
RATE = 3.0e12  # bytes/s of an H100's memory in a large read
LAUNCH = 1.3e-6  # seconds from one kernel of a CUDA graph to the next
ITEMSIZE = 2  # bfloat16
BITS = {"bfloat16": 16, "int8": 8, "int4": 4}  # weights as from_pretrained's quantize makes them
COLUMNS = {"model": "---", "weights": "---", "launches": "---:"} | {
    f"{what}, {context // 1024}k": "---:"
    for context in CONTEXTS
    for what in ("GB", "ms", "tokens/s")
}
MIXTURE = "gemma-4-26b-a4b"
PARTS = ATTENTION, DENSE, EXPERTS = "attention", "MLP and router", "experts"
READ, ALL = "µs of the bytes", "µs"
LAYER_COLUMNS = {"layer": "---", "weights": "---", "rows": "---"} | dict.fromkeys(
    ("experts read", *(f"MB, {part}" for part in PARTS), READ, ALL), "---:"
)


def launches(config: GemmaConfig) -> int:
    """Returns the launches of a step, as docs/decoding.md lists them."""
    per_layer = bool(config.hidden_size_per_layer_input)
    return layer_launches(config) * config.num_hidden_layers + 3 + 2 * per_layer


def layer_launches(config: GemmaConfig) -> int:
    return 5 + 2 * bool(config.hidden_size_per_layer_input) + 2 * bool(config.num_experts)


def sizes_of(config: GemmaConfig, bits: int) -> Sizes:
    """Returns the bytes per weight of the tensors that are packed in `bits` bits."""
    checkpoint = RoundedCheckpoint(RandomCheckpoint(config), bits)
    packings = {name: checkpoint.packing(name) for name in checkpoint.shapes}
    return {
        name: packing.bits / 8 + packing.scale.itemsize / packing.group
        for name, packing in packings.items()
        if packing is not None
    }


def step_bytes(config: GemmaConfig, context: int, sizes: Sizes = NO_SIZES) -> float:
    return pass_work(config, ITEMSIZE, 1, context - 1, 1, sizes).bytes


def step_seconds(config: GemmaConfig, context: int, sizes: Sizes = NO_SIZES) -> float:
    """Returns the predicted time of a step of one sequence, whose token is the last of `context`:
    the time to read each byte once, plus the time of the launches."""
    return step_bytes(config, context, sizes) / RATE + launches(config) * LAUNCH


def prediction() -> str:
    """Returns the table, as Markdown."""
    rows = []
    for name, (weights, bits) in product(MODELS, BITS.items()):
        config, sizes = PRESETS[name], sizes_of(PRESETS[name], bits)
        row = {"model": name, "weights": weights, "launches": str(launches(config))}
        for context in CONTEXTS:
            seconds, at = step_seconds(config, context, sizes), f"{context // 1024}k"
            row |= {
                f"GB, {at}": f"{step_bytes(config, context, sizes) / 1e9:.2f}",
                f"ms, {at}": f"{seconds * 1e3:.2f}", f"tokens/s, {at}": f"{1 / seconds:.0f}",
            }  # fmt: skip
        rows.append(row)
    return table(COLUMNS, rows)


def layer_bytes(
    config: GemmaConfig, layer: int, rows: int, experts: float, sizes: Sizes = NO_SIZES
) -> dict[str, float]:
    """Returns the bytes that a layer of a mixture of experts reads in a step of `rows` sequences,
    which choose `experts` different experts. Attention reads keys and values of CONTEXTS[0] tokens.
    """
    found = dict.fromkeys(PARTS, 0.0)
    for name, shape in config.layer_tensor_shapes(layer).items():
        full = f"model.layers.{layer}.{name}"
        part = EXPERTS if ".experts." in full else ATTENTION if "self_attn." in name else DENSE
        share = experts / config.num_experts if part == EXPERTS else 1
        found[part] += share * math.prod(shape) * sizes.get(full, ITEMSIZE)
    kind = config.layers[layer]
    seen = min(kind.window or CONTEXTS[0], CONTEXTS[0])
    cached = 2 * kind.num_key_value_heads * kind.head_dim * seen * ITEMSIZE
    found[ATTENTION] += rows * cached
    return found


def layer_prediction() -> str:
    """Returns the table of a layer of MIXTURE, as Markdown."""
    config, lines = PRESETS[MIXTURE], []
    kinds = {kind: config.layer_types.index(kind) for kind in (SLIDING, FULL)}
    cases = [(1, config.top_k_experts, "1"), (8, experts_read(config, 8), "8")]
    cases += [(8, 8 * config.top_k_experts, "8, all different")]
    sizes = {weights: sizes_of(config, bits) for weights, bits in BITS.items()}
    for kind, weights in product(kinds, BITS):
        for rows, experts, label in cases:
            parts = layer_bytes(config, kinds[kind], rows, experts, sizes[weights])
            read = 1e6 * sum(parts.values()) / RATE
            lines.append(
                {"layer": kind.partition("_")[0], "weights": weights, "rows": label}
                | {"experts read": f"{experts:.3g}"}
                | {f"MB, {part}": f"{size / 1e6:.1f}" for part, size in parts.items()}
                | {READ: f"{read:.1f}", ALL: f"{read + 1e6 * layer_launches(config) * LAUNCH:.1f}"}
            )
    return table(LAYER_COLUMNS, lines)


if __name__ == "__main__":
    click.echo(f"{prediction()}\n\n{layer_prediction()}")
