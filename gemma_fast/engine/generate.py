"""Prompt → text, read top to bottom:

tokenizer → prefill the cache with the prompt → choose a token → decode it → … → tokenizer

What happens between two tokens is decoder.py's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma_fast.compat import GENERATE, check_keywords
from gemma_fast.engine.decoder import Decoder
from gemma_fast.engine.request import (
    SAMPLING,
    check_mask,
    choose_options,
    choose_seed,
    new_tokens,
    token_ids,
)
from gemma_fast.engine.sampling import Sampling

if TYPE_CHECKING:
    from gemma_fast.causal_lm import GemmaForCausalLM


@torch.no_grad()
def generate_tokens(
    model: GemmaForCausalLM,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    streamer: Any = None,
    generation_config: Any = None,
    inputs: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """Continues prompts: [b, t] ids → [b, t + new], prompt included, as transformers gives it.

    input_ids       [b, t]; prompts of different lengths are padded on the left
    attention_mask  [b, t], 0 for padding; None: no padding
    max_new_tokens  how many tokens at most; max_length counts the prompt along. Neither: 20
    do_sample, temperature, top_k, top_p, min_p, repetition_penalty  see `sampling.Sampling`
    seed            the same seed draws the same text; None: one from torch's global generator
    eos_token_id    one or more ids that end a row; pad_token_id then fills it up
    stop_strings    texts that end a row as soon as they appear in what it generated; needs
                    `tokenizer`, anything with a `decode(ids) -> str`
    streamer        gets the prompt's ids, then each token's: `put(ids)`, at last `end()`
    generation_config  these options as a mapping, or as transformers' object
    inputs, others  input_ids' other name; keywords of transformers' that change nothing here, see
                    `keywords.GENERATE`. TypeError: one that is unknown, or would

    What is None is what generation_config says, or the checkpoint's generation_config.json, if
    anything. Ctrl-C ends generation and returns what there is. ValueError: an empty prompt, an id
    outside the vocabulary, more tokens than the model's context, a sampling value out of range,
    logits that are not finite. torch.OutOfMemoryError: no room for the cache. The model stays
    usable.
    """
    check_keywords("generate()", others, GENERATE)
    if inputs is not None and input_ids is not None:
        raise TypeError("generate() got input_ids and inputs, which name the same")
    ids = model.check_ids(inputs if input_ids is None else input_ids)
    b, t = ids.shape
    options = choose_options(
        {
            "max_new_tokens": max_new_tokens, "max_length": max_length, "do_sample": do_sample,
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
            "repetition_penalty": repetition_penalty, "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id, "stop_strings": stop_strings,
        },
        generation_config,
        model.generation_config,
    )  # fmt: skip
    new = new_tokens(t, options, model.config.max_position_embeddings)
    (pad,) = token_ids("pad_token_id", options, model.config)
    eos = token_ids("eos_token_id", options, model.config)
    ending = Ending(torch.tensor(eos, device="cpu"), options.get("stop_strings"), tokenizer)
    sampling = Sampling(**{k: v for k, v in options.items() if k in SAMPLING})
    seed = choose_seed(seed, sampling.do_sample)
    if attention_mask is not None:
        check_mask(attention_mask, ids)

    decoder = model.decoders.take(model, b, t + new)
    generated = torch.full((b, new), pad, device="cpu")
    finished = torch.zeros(b, dtype=torch.bool, device="cpu")
    end = 0
    try:
        if streamer is not None:
            streamer.put(ids.cpu())
        decoder.prefill(ids, attention_mask, sampling, seed)
        for token in tokens(decoder, new):
            token = token.masked_fill(finished, pad)
            refuse_not_finite(token, t + end)
            generated[:, end] = token
            end += 1
            if streamer is not None:
                streamer.put(token)
            finished |= ending(generated[:, :end])
            if finished.all():
                break
    except KeyboardInterrupt:
        pass
    finally:
        if streamer is not None:
            streamer.end()
    model.decoders.give_back(decoder)
    return torch.cat((ids, generated[:, :end].to(ids.device)), dim=1)


def tokens(decoder: Decoder, count: int) -> Iterator[Tensor]:
    """The next `count` tokens of each text, [b] on the host. While the caller looks at one, a GPU
    is at the next one already."""
    ahead = decoder.asynchronous
    read = decoder.read()
    for left in reversed(range(count)):
        if left and ahead:
            decoder.step()
            read_next = decoder.read()
        yield read()
        if not left:
            return
        if not ahead:
            decoder.step()
            read_next = decoder.read()
        read = read_next


def refuse_not_finite(token: Tensor, tokens: int) -> None:
    rows = (token < 0).nonzero().flatten().tolist()
    if rows:
        raise ValueError(
            f"the logits after {tokens} tokens are not finite, in rows {rows}: the weights are "
            "damaged, or overflow this dtype; try dtype='float32'"
        )


class Ending:
    """Which rows are complete: they end in a token of `eos` or have a stop string in their text."""

    def __init__(
        self, eos: Tensor, stop_strings: str | Sequence[str] | None, tokenizer: Any
    ) -> None:
        stop = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop_strings={stop_strings!r} must be one or more texts, none empty")
        if stop and tokenizer is None:
            raise ValueError("stop_strings needs tokenizer=…, to read what was generated")
        self.eos, self.stop, self.tokenizer = eos, stop, tokenizer

    def __call__(self, generated: Tensor) -> Tensor:
        """generated :: [b, new] → [b] bool"""
        ended = torch.isin(generated[:, -1], self.eos)
        if self.stop:
            # A token of text is a byte or more, so this tail holds the end of any that is new.
            tail = generated[:, -4 * max(map(len, self.stop)) :].tolist()
            texts = [self.tokenizer.decode(ids) for ids in tail]
            found = [any(stop in text for stop in self.stop) for text in texts]
            ended |= torch.tensor(found, device="cpu")
        return ended
