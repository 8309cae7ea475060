"""`gemma-fast serve` runs the HTTP server."""

from __future__ import annotations

from typing import Any

import click

from gemma_fast.cli import loading
from gemma_fast.cli.options import model_options

HINT = 'gemma-fast serve needs the extra `serve`: pip install ".[serve]"'


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Texts that are decoded at the same time.",
)
@click.option(
    "--max-length",
    type=click.IntRange(2),
    default=8192,
    show_default=True,
    help="Tokens of a text, prompt included; sets the size of the KV cache.",
)
@click.option(
    "--max-new-tokens", type=click.IntRange(1), help="Limit of max_tokens. [default: --max-length]"
)
@click.option(
    "--queue",
    type=click.IntRange(0),
    default=256,
    show_default=True,
    help="Texts that may wait; more get status 429.",
)
@click.option(
    "--chunk",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Prompt tokens that are read between two decode steps, at most.",
)
@click.option(
    "--max-time",
    type=float,
    default=600,
    show_default=True,
    help="Seconds after which a text ends, waiting included.",
)
@click.option(
    "--drain",
    type=click.IntRange(0),
    default=30,
    show_default=True,
    help="Seconds for running requests after SIGTERM.",
)
@click.option(
    "--batch-invariant", is_flag=True, help="A text has the same bits whatever runs beside it."
)
@click.option(
    "--api-key-file",
    type=click.Path(exists=True, dir_okay=False),
    help="File with an API key in each line. [default: GEMMA_FAST_API_KEY, or no key]",
)
@click.option(
    "--system-file",
    type=click.Path(exists=True, dir_okay=False),
    help="Text of a system message that many chats have; it is computed once.",
)
@click.option(
    "--served-name", help="Name of the model for clients. [default: the last part of --model]"
)
@model_options
def serve(host: str, port: int, drain: int, **chosen: Any) -> None:
    """Serve the model over HTTP, with the endpoints of OpenAI's API.

    The texts of several clients are decoded together. SIGTERM and Ctrl-C finish what runs.
    docs/server.md has the fields, limits and metrics."""
    try:
        from gemma_fast.server.run import bind, serve_http
        from gemma_fast.server.settings import Settings
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{HINT} ({error})") from error
    settings = Settings(**chosen)
    keys = settings.keys()  # an error comes before the model is loaded
    listener = bind(host, port)
    local = listener.getsockname()[0] in ("127.0.0.1", "::1")
    if not (local or keys):
        loading.warn(f"everyone who reaches {host} can use the server: pass --api-key-file")
    model, tokenizer = loading.load(
        settings.model, settings.device, settings.dtype, settings.quantize
    )
    app = settings.app(model, tokenizer, local=local)
    name, where = listener.getsockname()[:2]
    url = f"http://{f'[{name}]' if ':' in name else name}:{where}"
    serve_http(app, listener, drain, lambda: click.echo(_welcome(url, bool(keys)), err=True))


def _welcome(url: str, needs_key: bool) -> str:
    key = " -H 'Authorization: Bearer KEY'" if needs_key else ""
    body = '{"prompt": "I want to move", "max_tokens": 20}'
    return (
        f"Listening on {url}\n"
        f"  curl {url}/v1/completions{key} -H 'Content-Type: application/json' -d '{body}'"
    )
