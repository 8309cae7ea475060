"""Predicts the time of a decode step on an H100 from its bytes and launches. Measures nothing.

python -m benchmarks.model.predict    # prints the table of docs/benchmarks.md
"""

from __future__ import annotations

from itertools import product

import click

from gemma_fast.benchmarks.measure.report import table
from gemma_fast.benchmarks.model.cases import NO_SIZES, Sizes, pass_work
from gemma_fast.checkpoint.random import RandomCheckpoint
from gemma_fast.checkpoint.rounded import RoundedCheckpoint
from gemma_fast.config import GemmaConfig
from gemma_fast.presets import PRESETS

MODELS = (
    "gemma-4-e2b", "gemma-4-e4b", "gemma-4-12b", "gemma-4-31b", "gemma-2b", "gemma-3-12b",
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


def launches(config: GemmaConfig) -> int:
    """Returns the launches of a step, as docs/decoding.md lists them."""
    per_layer = bool(config.hidden_size_per_layer_input)
    return (5 + 2 * per_layer) * config.num_hidden_layers + 3 + 2 * per_layer


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


if __name__ == "__main__":
    click.echo(prediction())
