"""Prefill and decode of a whole model: this project's, the eager reference, and transformers.

    python benchmarks/bench_model.py                 # the demo weights, on a GPU if there is one
    python benchmarks/bench_model.py --model gemma-2b --json results.json  # random weights

All providers are called alike, `model(ids, past_key_values=…)`, one token after another, in turns.
Their logits are compared before anything is timed. Beside each time stands its share of the roof
that the same run measured: a large copy (bytes read + written) for decode, whose bytes are the
weights; a large matrix product for prefill, whose FLOPs are two a weight and token.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import click
import torch
import transformers
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.rivals import transformers_model  # noqa: E402
from gemma_fast.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from gemma_fast.config import PRESETS, GemmaConfig  # noqa: E402
from gemma_fast.demo import demo_checkpoint  # noqa: E402
from gemma_fast.layer import linear  # noqa: E402
from gemma_fast.load import RandomCheckpoint, pick_device, pick_dtype  # noqa: E402
from gemma_fast.model import GemmaForCausalLM  # noqa: E402
from gemma_fast.reference import Reference  # noqa: E402

PROMPT, NEW, REPEATS = 512, 32, 5
# Mean |Δ logit| from the reference, over the logits' spread, that rounding explains.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}

MODEL_HELP = f"""Directory, .gguf file, hub id, or a size to run with random weights:
{", ".join(PRESETS)}. [default: the demo weights]"""


@click.command(help=__doc__.split("\n")[0])
@click.option("--model", help=MODEL_HELP)
@click.option("--device", help="[default: the GPU if there is one]")
@click.option("--dtype", default="auto", show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write figures here.")
@torch.no_grad()
def main(model: str | None, device: str | None, dtype: str, json_file: Path | None) -> None:
    target = pick_device(device, None)
    checkpoint: Checkpoint
    if model in PRESETS:
        checkpoint = RandomCheckpoint(PRESETS[model], name=model)
    else:
        checkpoint = open_checkpoint(model or demo_checkpoint())
    kind = pick_dtype(dtype, checkpoint, target)
    options: dict[str, Any] = {"dtype": kind, "device": target}
    providers: dict[str, Callable[..., Any]] = {
        "reference": Reference.from_checkpoint(checkpoint, **options),
        "transformers (sdpa)": transformers_model(checkpoint, "sdpa", **options),
        "gemma_fast": GemmaForCausalLM.from_checkpoint(checkpoint, **options),
    }
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, checkpoint.config.vocab_size, (1, PROMPT), generator=generator)
    ids = ids.to(target)
    compare(providers, ids, TOLERANCE[kind])
    copy_rate, product_rate = roof(target, kind)
    times = race(providers, ids, target)

    weights, embedding = sizes(checkpoint.config)
    prompt_flops = 2 * (PROMPT * (weights - embedding) + embedding)  # logits of the last token only
    floors = {
        "prefill": prompt_flops / product_rate,
        "decode": weights * kind.itemsize / copy_rate,
    }
    report = {
        **stamp(target),
        "model": checkpoint.path.name,
        "dtype": str(kind).removeprefix("torch."),
        "roof": {"copy_GB_per_s": copy_rate / 1e9, "product_TFLOP_per_s": product_rate / 1e12},
        "prompt_tokens": PROMPT,
        "results": {
            name: {phase: summary(t, floors[phase]) for phase, t in phases.items()}
            for name, phases in times.items()
        },
    }
    show(report)
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report, indent=2) + "\n")


def sizes(config: GemmaConfig) -> tuple[int, int]:
    """Weights of the model and, of those, the embedding's."""
    return config.num_parameters, config.vocab_size * config.hidden_size


def step(provider: Callable[..., Any], ids: Tensor, past: Any = None, keep: int = 1) -> Any:
    return provider(ids, past_key_values=past, use_cache=True, logits_to_keep=keep)


def compare(providers: dict[str, Callable[..., Any]], ids: Tensor, tolerance: float) -> None:
    """Exits unless all agree with the reference on a prompt's end and the four tokens after it."""
    expected: Tensor | None = None
    for name, provider in providers.items():
        past, logits = None, []
        for part in ids.split((PROMPT - 4, 1, 1, 1, 1), dim=1):
            out = step(provider, part, past, keep=min(64, part.shape[1]))
            past = out.past_key_values
            logits.append(out.logits[0].float())
        found = torch.cat(logits)  # [64 + 4, vocab]
        expected = found if expected is None else expected
        off = float((found - expected).abs().mean() / expected.std())
        if not off < tolerance:
            raise SystemExit(f"{name}: logits {off:.2g} of their spread from the reference's")
        print(f"{name}: logits {off:.1g} of their spread from the reference's", file=sys.stderr)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def roof(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes/s of a large copy and FLOP/s of a large product, the median of seven."""
    size, n = 1 << 30, 8192 if device.type == "cuda" else 2048
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    copies = [seconds(lambda: target.copy_(source), device) for _ in range(9)][2:]
    products = [seconds(lambda: linear(a, b), device) for _ in range(9)][2:]
    return 2 * size / statistics.median(copies), 2 * n**3 / statistics.median(products)


def race(
    providers: dict[str, Callable[..., Any]], ids: Tensor, device: torch.device
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each prefill and each decoded token; in turns, and the first turn is warm-up."""
    times: dict[str, dict[str, list[float]]] = {
        name: {"prefill": [], "decode": []} for name in providers
    }
    console = Console(stderr=True)
    for repeat in track(range(REPEATS + 1), "Timing", console=console):
        for name, provider in providers.items():
            state: list[Any] = []
            prefill = seconds(lambda p=provider, s=state: s.append(step(p, ids)), device)
            decode = []
            for _ in range(NEW):
                out = state.pop()
                token = out.logits[:, -1:].argmax(-1)
                past = out.past_key_values
                work = lambda p=provider, s=state: s.append(step(p, token, past))  # noqa: B023, E731
                decode.append(seconds(work, device))
            if repeat:
                times[name]["prefill"].append(prefill)
                times[name]["decode"] += decode
    return times


def summary(times: list[float], floor: float) -> dict[str, float]:
    p20, *_, p80 = statistics.quantiles(times, n=5)
    median = statistics.median(times)
    return {
        "median_ms": median * 1e3, "p20_ms": p20 * 1e3, "p80_ms": p80 * 1e3,
        "share_of_roof": floor / median,
    }  # fmt: skip


def stamp(device: torch.device) -> dict[str, Any]:
    """Where, when and with what it was measured."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    cuda = device.type == "cuda"
    return {
        "date": date.today().isoformat(),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or None,
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "cpu": None if cuda else f"{cpu_name()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "driver": driver() if cuda else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
    }


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def show(report: dict[str, Any]) -> None:
    where = report["gpu"] or report["cpu"]
    rates = report["roof"]
    title = f"{report['model']}, {report['dtype']}, {where}, torch {report['torch']}"
    caption = f"roof: copy {rates['copy_GB_per_s']:.1f} GB/s"
    caption += f", product {rates['product_TFLOP_per_s']:.3f} TFLOP/s"
    table = Table(
        "provider", f"prefill {PROMPT} tokens", "of roof", f"a token at {PROMPT}", "of roof",
        title=title, caption=caption,
    )  # fmt: skip
    for name, phases in report["results"].items():
        cells = []
        for phase in ("prefill", "decode"):
            x = phases[phase]
            cells.append(f"{x['median_ms']:.1f} ms ({x['p20_ms']:.1f} … {x['p80_ms']:.1f})")
            cells.append(f"{x['share_of_roof']:.2f}")
        table.add_row(name, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
