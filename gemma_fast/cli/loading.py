"""Loads the model and the tokenizer of a command."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import click

from gemma_fast.compat import ONE_TEXT

if TYPE_CHECKING:
    from gemma_fast.causal_lm import GemmaForCausalLM
    from gemma_fast.text.tokenizer import Tokenizer


def load(
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


def warn(message: object) -> None:
    click.echo(f"Warning: {message}", err=True)
