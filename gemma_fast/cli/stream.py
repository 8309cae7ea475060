"""Generates a text for a command: streams it to stdout, and measures its speed."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from gemma_fast.compat import ONE_TEXT

if TYPE_CHECKING:
    import torch

    from gemma_fast.causal_lm import GemmaForCausalLM
    from gemma_fast.text.tokenizer import Tokenizer

# Options that have an effect only if tokens are sampled.
IMPLY_SAMPLE = ("temperature", "top_k", "top_p", "min_p")


def stream(
    model: GemmaForCausalLM,
    tokenizer: Tokenizer,
    ids: torch.Tensor,
    sampling: dict[str, Any],
    *,
    silent: bool = False,
    chat: bool = False,
) -> tuple[list[int], dict[str, Any]]:
    """Generates text, and unless `silent` prints it and its speed. Returns the new ids and the
    statistics of `_speed`.

    chat  print only the answer to stdout, and its thoughts to stderr
    """
    from gemma_fast.text.streaming import ChatStreamer, TextStreamer

    screen = _Screen()
    streamer: TextStreamer = (
        ChatStreamer(tokenizer, screen.thought, write=screen.text)
        if chat
        else TextStreamer(tokenizer, skip_special_tokens=True, write=screen.text)
    )
    clock = _Clock(None if silent else streamer)
    passed = given_options(sampling)
    out = model.generate(ids, streamer=clock, tokenizer=tokenizer, **ONE_TEXT, **passed)
    stats = _speed(ids.shape[1], clock.times, model)
    if not silent:
        click.echo()
        click.echo(_summary(stats), err=True)
    return out[0, ids.shape[1] :].tolist(), stats


def given_options(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of generate() that the command line sets, from the values of
    `options.sampling_options`."""
    do_sample = sampling["sample"]
    if do_sample is None and any(sampling[name] is not None for name in IMPLY_SAMPLE):
        do_sample = True
    stop_strings = [*sampling["stop_strings"]] or None
    given = {**sampling, "do_sample": do_sample, "stop_strings": stop_strings}
    del given["sample"]
    return {name: value for name, value in given.items() if value is not None}


class _Screen:
    """Prints text to stdout, and thoughts dim to stderr, on lines of their own."""

    def __init__(self) -> None:
        self._in_line = False  # a thought does not end with a newline

    def thought(self, text: str) -> None:
        click.secho(text, nl=False, err=True, dim=True)
        self._in_line = not text.endswith("\n")

    def text(self, text: str) -> None:
        if self._in_line:
            click.echo(err=True)
            self._in_line = False
        click.echo(text, nl=False)


class _Clock:
    """Records the time of each call of `put`, and passes the ids to `streamer` if there is one."""

    def __init__(self, streamer: Any = None) -> None:
        self.streamer = streamer
        self.times: list[float] = []

    def put(self, ids: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if self.streamer:
            self.streamer.put(ids)

    def end(self) -> None:
        if self.streamer:
            self.streamer.end()


def _speed(prompt: int, times: list[float], model: GemmaForCausalLM) -> dict[str, Any]:
    """Returns the speed and memory of one generate() call. times: when the streamer received the
    prompt and each new token, in seconds."""
    import resource

    import torch

    start, *tokens = times
    unit = 1 if sys.platform == "darwin" else 1024  # bytes per unit of ru_maxrss
    stats: dict[str, Any] = {"prompt_tokens": prompt, "new_tokens": len(tokens)}
    if tokens:
        stats["time_to_first_token_s"] = tokens[0] - start
        stats["prompt_tokens_per_s"] = prompt / (tokens[0] - start)
    if len(tokens) > 1:
        stats["decode_tokens_per_s"] = (len(tokens) - 1) / (tokens[-1] - tokens[0])
    stats["memory_bytes"] = model.memory()
    stats["peak_memory_bytes"] = (
        torch.cuda.max_memory_allocated(model.device)
        if model.device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    )
    return stats


def _summary(stats: dict[str, Any]) -> str:
    parts = [f"{stats['prompt_tokens']} prompt tokens"]
    if "time_to_first_token_s" in stats:
        parts[0] += f" at {stats['prompt_tokens_per_s']:.1f} tokens/s"
        parts.append(f"first token after {stats['time_to_first_token_s']:.3f} s")
    parts.append(f"{stats['new_tokens']} new tokens")
    if "decode_tokens_per_s" in stats:
        parts[-1] += f" at {stats['decode_tokens_per_s']:.1f} tokens/s"
    kept = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in stats["memory_bytes"].items())
    return " · ".join([*parts, f"peak memory {stats['peak_memory_bytes'] / 1e9:.2f} GB ({kept})"])
