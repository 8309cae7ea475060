"""`gemma-fast generate` and `gemma-fast chat` stream text."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import click

from gemma_fast.cli import loading
from gemma_fast.cli.options import model_options, sampling_options
from gemma_fast.cli.stream import stream

if TYPE_CHECKING:
    from gemma_fast.causal_lm import GemmaForCausalLM
    from gemma_fast.text.tokenizer import Tokenizer


@click.command()
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
    gemma, tokenizer = loading.load(model, device, dtype, quantize)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    new, stats = stream(gemma, tokenizer, ids, sampling, silent=as_json)
    if as_json:
        text = tokenizer.decode(new, skip_special_tokens=True)
        click.echo(
            json.dumps({"prompt": prompt, "text": text, "ids": new, **stats}, ensure_ascii=False)
        )


@click.command()
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

    gemma, tokenizer = loading.load(model, device, dtype, quantize)
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


def _warn_of_missing_template(tokenizer: Tokenizer) -> None:
    from gemma_fast.text.chat_encoder import NO_TEMPLATE

    if tokenizer.chat_template is None:
        if tokenizer.turns is None:
            raise click.ClickException(
                f"{tokenizer.source} has no chat template, and no <start_of_turn> and"
                " <end_of_turn>: use an instruction-tuned (-it) model with its chat template"
            )
        loading.warn(f"{tokenizer.source}: {NO_TEMPLATE}")


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
