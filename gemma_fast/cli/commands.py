"""The command `gemma-fast` and its subcommands.

    gemma-fast predict "I want to move"         show the most likely tokens after each prompt token
    gemma-fast generate "I want to move" -n 30  stream a continuation of the prompt
    gemma-fast chat --model path/to/gemma-it    chat with an instruction-tuned model
    gemma-fast batch prompts.jsonl --out answers.jsonl  continue each prompt of a file
    gemma-fast serve --model path/to/gemma-it   answer over HTTP, with OpenAI's endpoints
    gemma-fast walkthrough "I want to move"     write a page of pictures of the model at work
    gemma-fast bench --model demo               compare the speed with PyTorch and transformers
    gemma-fast verify                           check numerical accuracy on this machine

Text goes to stdout; progress, speed and errors go to stderr.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import click

from gemma_fast.cli.batch import batch
from gemma_fast.cli.generate import chat, generate
from gemma_fast.cli.loading import warn
from gemma_fast.cli.options import (
    device_option,
    dtype_option,
    model_option,
    model_options,
    options,
    quantize_option,
)
from gemma_fast.cli.predict import predict
from gemma_fast.cli.serve import serve


class _Errors(click.Group):
    """Prints an error of the library as one message, without a traceback; the exit status is 1.
    Prints warnings without the place in the code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_: warn(message)
                return super().invoke(ctx)
        except (ValueError, OSError, ImportError) as error:
            raise click.ClickException(str(error)) from error
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            raise click.ClickException(str(error)) from error


@click.group(cls=_Errors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gemma_fast")
def main() -> None:
    """Run Google's Gemma on Triton kernels."""


for command in (predict, generate, chat, batch, serve):
    main.add_command(command)


@main.command(short_help="Write a page of pictures of the model at work on PROMPT.")
@click.argument("prompt")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("walkthrough"),
    show_default=True,
    help="Folder for the page, its pictures and data.json.",
)
@click.option("--open", "show", is_flag=True, help="Open the page in the browser.")
@click.option(
    "--words",
    help="Words whose embeddings are compared, with commas between. [default: colors,"
    " places, adjectives]",
)
@model_options
def walkthrough(
    prompt: str, out: Path, show: bool, words: str | None, model: str | None, **where: Any
) -> None:
    """Write a page that explains each step of the model with pictures of it at work on PROMPT.

    Open index.html in any browser; it needs no network. docs/walkthrough.md describes data.json.
    The page shows plain PyTorch with unpacked weights, for GGUF in float32 on a CPU. --quantize
    rounds their values, as in a packed model.
    """
    from rich.console import Console
    from rich.text import Text

    from gemma_fast.demo import demo_checkpoint
    from gemma_fast.walkthrough.write import write_walkthrough

    chosen = None if words is None else [x.strip() for x in words.split(",") if x.strip()]
    if chosen == []:
        raise click.BadParameter("there is no word in it", param_hint="--words")
    with Console(stderr=True).status("") as status:
        page = write_walkthrough(
            prompt, model or demo_checkpoint(), out, words=chosen,
            progress=lambda name: status.update(Text(name)), **where,
        )  # fmt: skip
    click.echo(page)
    if show and click.launch(page.absolute().as_uri()) != 0:
        warn(f"no browser was found: open {page} in one")


@main.command(
    short_help="Compare the speed with PyTorch and transformers.",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def bench(context: click.Context, arguments: tuple[str, ...]) -> None:
    """Passes the arguments to benchmarks/options.py, which is imported only if `bench` runs."""
    from gemma_fast.benchmarks.options import bench as command

    with command.make_context("bench", [*arguments], parent=context.parent) as inner:
        command.invoke(inner)


@main.command(short_help="Check numerical accuracy on this machine.")
@click.option(
    "--tokens",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Number of greedy tokens to compare.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with all results.")
@options(
    model_option,
    device_option,
    dtype_option("The model's dtype. auto: check all usual dtypes."),
    quantize_option,
)
@click.pass_context
def verify(context: click.Context, **chosen: Any) -> None:
    """Measure the error of every kernel against float64, and the error of the model against
    transformers in float32. transformers reads the checkpoint itself; a GGUF file is read by
    llama.cpp's rules. Eager PyTorch and transformers are measured in the same way. The exit status
    is 1 if an error exceeds theirs by more than the printed margin. --model can also be a size with
    random weights, as in bench. Packed weights are also compared with unpacked ones, on three
    texts."""
    from gemma_fast.benchmarks.verify.certificate import certify

    context.exit(0 if certify(**chosen) else 1)
