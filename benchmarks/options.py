"""The command `gemma-fast bench` and its options. Other benchmark commands share some options.

Large packages are imported inside functions, so that help and usage errors appear at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from gemma_fast.compat import QUANTIZE, QUANTIZE_HELP
from gemma_fast.presets import PRESETS

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]
MODEL_HELP = f"""demo (the demo weights), a size with random weights (tiny, {", ".join(PRESETS)}),
a directory, a .gguf file, a hub id. [default: gemma-2b on a GPU; on a CPU tiny, which is checked
but not timed]"""


DTYPES = ("bfloat16", "float16", "float32")


def several(*names: str, read: Callable[[str], Any], metavar: str, **more: Any) -> Decorator:
    """Returns a decorator that adds an option with several values.

    The values are separated by commas, or the option is repeated. Duplicates are dropped.

    read: returns a value from its text; raises ValueError for a text that is wrong
    """

    def parse(context: Any, option: Any, texts: Sequence[str]) -> tuple[Any, ...]:
        try:
            return tuple(dict.fromkeys(read(x) for text in texts for x in text.split(",")))
        except ValueError as error:
            raise click.BadParameter(str(error)) from error

    return click.option(*names, multiple=True, callback=parse, metavar=metavar, **more)


def counts(*names: str, default: int, least: int, help: str, own_depth: bool = False) -> Decorator:
    """Returns a decorator that adds an option for integers. With `own_depth`, a value may also be
    N@D, which becomes (N, D)."""

    def read(text: str) -> int | tuple[int, ...]:
        parts = text.split("@") if own_depth else [text]
        if len(parts) > 2 or not all(x.strip().isdecimal() for x in parts):
            raise ValueError(f"{text!r} is not a whole number")
        found = [int(x) for x in parts]
        if found[0] < least:
            raise ValueError(f"{found[0]} is less than {least}")
        return found[0] if len(found) == 1 else tuple(found)

    metavar = "N[@D],…" if own_depth else "N,N…"
    help = f"{help} [default: {default}]"
    return several(*names, read=read, metavar=metavar, default=[str(default)], help=help)


def dtype(text: str) -> str:
    if text not in DTYPES:
        raise ValueError(f"{text!r} is not one of {', '.join(DTYPES)}")
    return text


DTYPE_HELP = "[default: bfloat16 on a GPU, float32 on a CPU; for packed weights as in generate]"
dtype_option = click.option("--dtype", type=click.Choice(DTYPES), help=DTYPE_HELP)
quantize_option = click.option("--quantize", type=click.Choice(QUANTIZE), help=QUANTIZE_HELP)
commit_option = click.option("--commit", help="Commit to record instead of git's current commit.")
size_option = click.option(
    "--size", "sizes", multiple=True, help="Run only sizes whose name contains this; repeatable."
)


def out_option(help: str) -> Callable[[Command], Command]:
    return click.option("--out", type=click.Path(path_type=Path, file_okay=False), help=help)


OPTIONS = (
    counts(
        "-p", "prompts", default=512, least=0, own_depth=True,
        help="Number of prompt tokens; 0: no prefill. N@D: at this depth only.",
    ),
    counts(
        "-n", "new", default=128, least=0, own_depth=True,
        help="Number of new tokens; 0: no decoding. N@D: at this depth only.",
    ),
    counts("-d", "depths", default=0, least=0, help="Number of tokens already in the cache."),
    counts("-b", "batches", default=1, least=1, help="Batch size."),
    counts(
        "--arrival", "arrival", default=0, least=0,
        help="Continuous batching instead of pp and tg: this number of prompts of mixed lengths, of"
        " -p tokens at most, -n new tokens each, -b texts at the same time.",
    ),
    click.option(
        "-r", "repeats", type=click.IntRange(1), default=5, show_default=True, metavar="N",
        help="Timed runs of each test; short tests are run more often.",
    ),
    click.option("--model", help=MODEL_HELP),
    several(
        "--dtype", "dtypes", read=dtype, metavar="DTYPE,…",
        help=f"{', '.join(DTYPES)}; several run side by side. {DTYPE_HELP}",
    ),
    quantize_option,
    click.option(
        "--only", multiple=True, metavar="PROVIDER", help="Run only this provider; repeatable."
    ),
    click.option(
        "-o", "output", type=click.Choice(["md", "json"]), default="md", show_default=True,
        help="Format in which the model's results are printed.",
    ),
    out_option("Write results.json, results.md and plots here."),
    commit_option,
)  # fmt: skip


def options(command: Command) -> Command:
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def pick_sizes(names: Iterable[str], parts: Sequence[str]) -> list[str]:
    """Returns the names that contain at least one of the parts, or all names if parts is empty."""
    return [name for name in names if not parts or any(part in name for part in parts)]


def refuse_unused_sizes(names: Sequence[str], parts: Iterable[str]) -> None:
    if unused := [part for part in parts if not pick_sizes(names, [part])]:
        raise click.UsageError(f"no size has {' or '.join(unused)} in its name")


def refuse_options(context: click.Context, names: Iterable[str], why: str) -> None:
    """Raises UsageError if one of the parameters was given on the command line."""
    for name in names:
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            option = next(x.opts[0] for x in context.command.params if x.name == name)
            raise click.UsageError(f"{option} {why}")


def make_folder(out: Path | None) -> None:
    try:
        if out:
            out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"--out {out}: {error}") from error


def refuse_unknown(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    if unknown := [name for name in names if name not in known]:
        raise click.UsageError(f"no {what} {', '.join(unknown)}: choose from {', '.join(known)}")


@click.command(short_help="Speed of a whole model, compared with rivals.")
@options
@click.pass_context
def bench(context: click.Context, **chosen: Any) -> None:
    """Measures the prefill (pp) and decode (tg) speed of a whole model, in tokens per second.
    Compares it with eager PyTorch, transformers and this machine's peak rates. Packed weights are
    also compared with unpacked ones and with llama.cpp (package llama-cpp-python; .gguf files).
    Exits with status 1 if a result is wrong or gemma_fast fails."""
    from gemma_fast.benchmarks.model.command import run_model
    from gemma_fast.benchmarks.model.providers import providers_of

    refuse_unknown("provider", chosen["only"], providers_of(any(chosen["arrival"])))
    make_folder(chosen["out"])
    context.exit(0 if run_model(**chosen) else 1)
