"""The command `gemma-fast` and its subcommands.

    gemma-fast predict "I want to move"         show the most likely tokens after each prompt token
    gemma-fast generate "I want to move" -n 30  stream a continuation of the prompt
    gemma-fast chat --model path/to/gemma-it    chat with an instruction-tuned model
    gemma-fast walkthrough "I want to move"     write a page of pictures of the model at work
    gemma-fast bench --model demo               compare the speed with PyTorch and transformers
    gemma-fast verify                           check numerical accuracy on this machine

Text goes to stdout; progress, speed and errors go to stderr.
"""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_fast.cli_stream import stream
from gemma_fast.compat import ONE_TEXT, QUANTIZE, QUANTIZE_HELP

if TYPE_CHECKING:
    from gemma_fast.causal_lm import GemmaForCausalLM
    from gemma_fast.text.tokenizer import Tokenizer

Command = Callable[..., None]


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def apply(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


_model = click.option(
    "--model", help="Directory, .gguf file or hub id. [default: the demo weights]"
)
_device = click.option("--device", help="cuda, cuda:1 or cpu. [default: the GPU, if there is one]")
_quantize = click.option("--quantize", type=click.Choice(QUANTIZE), help=QUANTIZE_HELP)


def _dtype(help: str) -> Callable[[Command], Command]:
    choice = click.Choice(["auto", "float32", "bfloat16", "float16"])
    return click.option("--dtype", type=choice, default="auto", help=help)


model_options = _options(
    _model,
    _device,
    _dtype(
        "auto: the checkpoint's; for GGUF bfloat16 on a GPU, and on a CPU that has kernels for its"
        " packed weights, else float32."
    ),
    _quantize,
)
sampling_options = _options(
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


class _Errors(click.Group):
    """Prints an error of the library as one message, without a traceback; the exit status is 1.
    Prints warnings without the place in the code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_: _warn(message)
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


@main.command(short_help="Show the most likely tokens after each token of PROMPT.")
@click.argument("prompt")
@click.option(
    "--top", type=click.IntRange(1), default=10, show_default=True, help="Number of tokens to show."
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print a JSON array with one object per prompt token."
)
@model_options
def predict(prompt: str, top: int, as_json: bool, **model_kwargs: Any) -> None:
    """Show the most likely next tokens after each token of PROMPT, with their probabilities."""
    model, tokenizer = _load(**model_kwargs)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    logits = model(ids, use_cache=False).logits[0].float()  # [t, vocab]
    best = logits.topk(min(top, logits.shape[-1]))
    best_probabilities = (best.values - logits.logsumexp(-1, keepdim=True)).exp()
    rows = [
        {
            "token": tokenizer.decode(token),
            "id": token,
            "next": [
                {"token": tokenizer.decode(i), "id": i, "probability": p}
                for p, i in zip(probabilities, ids_after, strict=True)
            ],
        }
        for token, probabilities, ids_after in zip(
            ids[0].tolist(), best_probabilities.tolist(), best.indices.tolist(), strict=True
        )
    ]
    if as_json:
        click.echo(json.dumps(rows, ensure_ascii=False))
        return
    from rich.columns import Columns
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("after", "most likely next tokens, with probabilities", show_lines=True)
    for row in rows:
        cells = [f"{x['token']!r} {x['probability']:.4f}" for x in row["next"]]
        table.add_row(repr(row["token"]), Columns(map(Text, cells), padding=(0, 3)))
    Console().print(table)


@main.command()
@click.argument("prompt")
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object at the end, and do not stream."
)
@model_options
@sampling_options
def generate(
    prompt: str, as_json: bool, model: str, device: str, dtype: str, quantize: str | None,
    **sampling: Any,
) -> None:  # fmt: skip
    """Continue PROMPT, and print each token as it is generated."""
    gemma, tokenizer = _load(model, device, dtype, quantize)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    new, stats = stream(gemma, tokenizer, ids, sampling, silent=as_json)
    if as_json:
        text = tokenizer.decode(new, skip_special_tokens=True)
        click.echo(
            json.dumps({"prompt": prompt, "text": text, "ids": new, **stats}, ensure_ascii=False)
        )


@main.command()
@click.option("--system", help="System message for the model (Gemma 3 and 4).")
@click.option(
    "--think/--no-think",
    default=None,
    help="Let the model think before it answers, or not (Gemma 4). [default: as in its template]",
)
@model_options
@sampling_options
def chat(
    system: str | None, think: bool | None, model: str, device: str, dtype: str,
    quantize: str | None, **sampling: Any,
) -> None:  # fmt: skip
    """Chat with an instruction-tuned model. Ctrl-C stops an answer, Ctrl-D ends the chat.

    Thoughts are printed to stderr, and are not part of later prompts."""
    from gemma_fast.text.streaming import split_thoughts

    gemma, tokenizer = _load(model, device, dtype, quantize)
    _warn_of_missing_template(tokenizer)
    variables = _thinking(tokenizer, think)
    ends = _ends(gemma, tokenizer)
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            text = click.prompt("you", prompt_suffix="> ", err=True)
        except click.Abort:
            click.echo(err=True)
            return
        messages.append({"role": "user", "content": text})
        with warnings.catch_warnings():  # _warn_of_missing_template has printed this warning
            warnings.filterwarnings("ignore", message=".*there is no chat template")
            encoding: Any = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", **variables
            )
        options = {**sampling, "eos_token_id": ends}
        try:
            new, _ = stream(gemma, tokenizer, encoding.input_ids, options, chat=True)
        except ValueError as error:
            click.echo(f"Error: {error}", err=True)
            messages.pop()
            continue
        _, answer = split_thoughts(tokenizer, new, encoding.input_ids[0].tolist())
        messages.append({"role": "assistant", "content": answer})


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
        _warn(f"no browser was found: open {page} in one")


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
@_options(_model, _device, _dtype("The model's dtype. auto: check all usual dtypes."), _quantize)
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


def _warn_of_missing_template(tokenizer: Tokenizer) -> None:
    from gemma_fast.text.chat_encoder import NO_TEMPLATE

    if tokenizer.chat_template is None:
        if tokenizer.turns is None:
            raise click.ClickException(
                f"{tokenizer.source} has no chat template, and no <start_of_turn> and"
                " <end_of_turn>: use an instruction-tuned (-it) model with its chat template"
            )
        _warn(f"{tokenizer.source}: {NO_TEMPLATE}")


def _thinking(tokenizer: Tokenizer, think: bool | None) -> dict[str, Any]:
    """Returns the template's variable that lets the model think, or does not."""
    if think is None:
        return {}
    name = "enable_thinking"
    if tokenizer.chat_template is None or name not in tokenizer.get_chat_template():
        raise click.BadParameter(
            f"the chat template of {tokenizer.source} has no variable {name}",
            param_hint="--think/--no-think",
        )
    return {name: think}


def _warn(message: object) -> None:
    click.echo(f"Warning: {message}", err=True)


def _ends(model: GemmaForCausalLM, tokenizer: Tokenizer) -> list[int]:
    """Returns the ids that end an answer: those that end a text in `generate`, and the tokenizer's
    ends of a turn. Says which ones the checkpoint does not list."""
    listed = set(model.end_token_ids)
    more = [token_id for token_id in tokenizer.stop_token_ids if token_id not in listed]
    if more:
        names = ", ".join(f"{tokenizer.decode(token_id)} ({token_id})" for token_id in more)
        click.echo(
            f"Answers also end at {names}, which the checkpoint's eos_token_id does not list",
            err=True,
        )
    return sorted({*listed, *more})


def _load(
    model: str | None, device: str | None, dtype: str, quantize: str | None
) -> tuple[GemmaForCausalLM, Tokenizer]:
    from gemma_fast.demo import demo_checkpoint

    gc.disable()  # modules, vocabulary and model are a million objects, and none is garbage
    try:
        with ThreadPoolExecutor(1) as pool:
            path = pool.submit(lambda: model or demo_checkpoint())
            from gemma_fast.causal_lm import GemmaForCausalLM  # imports torch, which takes a second
            from gemma_fast.text.tokenizer import Tokenizer
        tokenizer = Tokenizer.from_pretrained(path.result())
        tokenizer.require_bos()
        gemma = GemmaForCausalLM.from_pretrained(
            path.result(), dtype=dtype, device=device, quantize=quantize
        )
    finally:
        gc.freeze()  # later collections, and the one at exit, skip these objects
        gc.enable()
    if gemma.device.type == "cuda":
        _warm_up(gemma)
    return gemma, tokenizer


def _warm_up(gemma: GemmaForCausalLM) -> None:
    """Compiles kernels and captures a graph, so that the speed of later calls is not theirs."""
    import torch

    bos = torch.tensor([[gemma.config.bos_token_id]])  # the tokenizer may have no bos token
    gemma.generate(
        bos, max_new_tokens=3, min_new_tokens=0, do_sample=False, eos_token_id=[], stop_strings=[],
        **ONE_TEXT,
    )  # fmt: skip
