"""Options that several subcommands share."""

from __future__ import annotations

from collections.abc import Callable

import click

from gemma_fast.compat import QUANTIZE, QUANTIZE_HELP

Command = Callable[..., None]


def options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def apply(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


model_option = click.option(
    "--model", help="Directory, .gguf file or hub id. [default: the demo weights]"
)
device_option = click.option(
    "--device", help="cuda, cuda:1 or cpu. [default: the GPU, if there is one]"
)
quantize_option = click.option("--quantize", type=click.Choice(QUANTIZE), help=QUANTIZE_HELP)


def dtype_option(help: str) -> Callable[[Command], Command]:
    choice = click.Choice(["auto", "float32", "bfloat16", "float16"])
    return click.option("--dtype", type=choice, default="auto", help=help)


model_options = options(
    model_option,
    device_option,
    dtype_option(
        "auto: the checkpoint's; for GGUF bfloat16 on a GPU, and on a CPU that has kernels for its"
        " packed weights, else float32."
    ),
    quantize_option,
)
sampling_options = options(
    click.option("-n", "--max-new-tokens", type=int, default=256, show_default=True),
    click.option(
        "--sample/--greedy",
        default=None,
        help="Sample tokens, or take the most likely ones. [default: as in generation_config.json]",
    ),
    click.option(
        "--temperature", type=float, help="Divisor of the logits; implies --sample. 0 is greedy."
    ),
    click.option("--top-k", type=int, help="Keep the k most likely tokens; implies --sample."),
    click.option(
        "--top-p",
        type=float,
        help="Keep the most likely tokens with a total probability of p; implies --sample.",
    ),
    click.option(
        "--min-p",
        type=float,
        help="Keep tokens with at least p times the highest probability; implies --sample.",
    ),
    click.option(
        "--repetition-penalty", type=float, help="Above 1: make repeated tokens less likely."
    ),
    click.option("--seed", type=int, help="The same seed gives the same text."),
    click.option(
        "--stop", "stop_strings", multiple=True, help="Stop when this text appears; repeatable."
    ),
)
