"""`gemma-fast predict` shows the most likely tokens after each token of a prompt."""

from __future__ import annotations

import json
from typing import Any

import click

from gemma_fast.cli import loading
from gemma_fast.cli.options import model_options


@click.command(short_help="Show the most likely tokens after each token of PROMPT.")
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
    model, tokenizer = loading.load(**model_kwargs)
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
