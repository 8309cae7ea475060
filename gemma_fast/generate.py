"""Prompt → text, read top to bottom:

tokenizer → prefill the cache with the prompt → choose a token → decode it → … → tokenizer
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma_fast.cache import KVCache
from gemma_fast.sampling import Sampling

if TYPE_CHECKING:
    from gemma_fast.model import GemmaForCausalLM

# A prompt is read in chunks of this many tokens, which bounds the memory its activations take.
PREFILL_CHUNK = 2048


@torch.no_grad()
def generate_tokens(
    model: GemmaForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int | None = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    streamer: Any = None,
) -> Tensor:
    """Continues prompts: [b, t] ids → [b, t + new], prompt included, as transformers gives it.

    input_ids       [b, t]; prompts of different lengths are padded on the left
    attention_mask  [b, t], 0 for padding; None: no padding
    max_new_tokens  how many tokens at most; a finished row is filled up with the padding token
    do_sample, temperature, top_k, top_p, min_p, repetition_penalty  see `sampling.Sampling`
    seed            the same seed draws the same text; None: torch's global generator
    eos_token_id    one or more ids that end a row
    stop_strings    texts that end a row as soon as they appear in what it generated; needs
                    `tokenizer`, anything with a `decode(ids) -> str`
    streamer        gets the prompt's ids, then each token's: `put(ids)`, at last `end()`

    What is None is what the checkpoint's generation_config.json says, if anything. Ctrl-C ends
    generation and returns what there is. ValueError: an empty prompt, an id outside the vocabulary,
    more tokens than the model's context, a sampling value out of range.
    """
    ids = model.check_ids(input_ids)
    b, t = ids.shape
    config, defaults = model.config, model.generation_config
    given = {
        "do_sample": do_sample, "temperature": temperature, "top_k": top_k, "top_p": top_p,
        "min_p": min_p, "repetition_penalty": repetition_penalty,
    }  # fmt: skip
    sampling = Sampling(**_or_defaults(given, defaults))
    limits = _or_defaults(
        {"max_new_tokens": max_new_tokens, "eos_token_id": eos_token_id}, defaults
    )
    new = _check_length(t, limits.get("max_new_tokens"), config.max_position_embeddings)
    eos_ids = _token_ids(limits.get("eos_token_id", config.eos_token_id))
    eos = torch.tensor(eos_ids, dtype=torch.long, device=ids.device)
    stop = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
    if stop and tokenizer is None:
        raise ValueError("stop_strings needs tokenizer=…, to read what was generated")
    generator = None if seed is None else torch.Generator(ids.device).manual_seed(seed)

    cache = KVCache(config, b, t + new, dtype=model.dtype, device=model.device)
    cache.align(t, attention_mask)
    ids = torch.cat((ids, ids.new_full((b, new), config.pad_token_id)), dim=1)
    finished = torch.zeros(b, dtype=torch.bool, device=ids.device)
    end = t
    try:
        if streamer is not None:
            streamer.put(ids[:, :t].cpu())
        logits = prefill(model, ids[:, :t], cache)
        while True:
            token = sampling(logits, ids[:, :end], generator)
            token = token.masked_fill(finished, config.pad_token_id)
            ids[:, end] = token
            end += 1
            if streamer is not None:
                streamer.put(token.cpu())
            finished |= torch.isin(token, eos)
            if stop:
                finished |= _contains_stop(ids[:, t:end], stop, tokenizer)
            if end == t + new or finished.all():
                break
            logits = decode(model, token, cache)
    except KeyboardInterrupt:
        pass
    if streamer is not None:
        streamer.end()
    return ids[:, :end]


def prefill(model: GemmaForCausalLM, ids: Tensor, cache: KVCache) -> Tensor:
    """Reads a prompt, ids :: [b, t], into the cache → logits :: [b, vocab] after its last token."""
    for chunk in ids.split(PREFILL_CHUNK, dim=1):
        hiddens = model.hidden_states(chunk, cache)
    return model.logits(hiddens[:, -1])


def decode(model: GemmaForCausalLM, token: Tensor, cache: KVCache) -> Tensor:
    """One more token in each row, [b] → logits :: [b, vocab] after it."""
    return model.logits(model.hidden_states(token.unsqueeze(1), cache)[:, -1])


def _or_defaults(given: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    chosen = {k: defaults.get(k) if value is None else value for k, value in given.items()}
    return {k: value for k, value in chosen.items() if value is not None}


def _check_length(prompt: int, new: Any, context: int) -> int:
    if isinstance(new, bool) or not isinstance(new, int) or new < 1:
        raise ValueError(f"max_new_tokens={new!r} must be a whole number from 1")
    if prompt + new > context:
        raise ValueError(
            f"a prompt of {prompt} tokens and max_new_tokens={new} do not fit the model's context "
            f"of {context}"
        )
    return new


def _token_ids(eos: Any) -> list[int]:
    ids = list(eos) if isinstance(eos, list | tuple) else [eos]
    if not all(isinstance(token, int) for token in ids):
        raise ValueError(f"eos_token_id={eos!r} must be one or more token ids")
    return ids


def _contains_stop(generated: Tensor, stop: list[str], tokenizer: Any) -> Tensor:
    """generated :: [b, new] → [b]: whether its text has a stop string. A token of text is a byte or
    more, so the last 4 * (longest stop string) tokens hold the end of any that is new."""
    tail = generated[:, -4 * max(map(len, stop)) :].tolist()
    texts = [tokenizer.decode(ids) for ids in tail]
    found = [any(s in text for s in stop) for text in texts]
    return torch.tensor(found, device=generated.device)
