"""Requests → their new tokens, read top to bottom:

prefill the cache with the prompts → choose a token → decode it → choose the next → … → stop

What happens between two tokens is decoder.py's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gemma_fast.engine.decoder import Decoder
from gemma_fast.engine.pool import DecoderPool
from gemma_fast.engine.request import Request
from gemma_fast.engine.stopping import Stopping
from gemma_fast.model.gemma import Gemma


@torch.no_grad()
def generate_tokens(
    model: Gemma, decoders: DecoderPool, requests: Sequence[Request], tokenizer: Any, streamer: Any
) -> Tensor:
    """[b, new], on the host: what follows each prompt, filled up with padding once it has ended.

    tokenizer reads what stop strings are looked for in. streamer, or None, gets the prompts, then
    each token: `put(ids)`, and at last `end()`. Ctrl-C returns what there is. ValueError: logits
    that are not finite. torch.OutOfMemoryError: no room for the cache.
    """
    stopping = Stopping(requests, tokenizer)
    ids, mask = stack_prompts(requests)
    b, t = ids.shape
    new = max(request.max_new_tokens for request in requests)
    pad = torch.tensor([request.pad_token_id for request in requests], device="cpu")
    decoder = decoders.take(model, b, t + new)
    generated = pad.unsqueeze(1).repeat(1, new)
    finished = torch.zeros(b, dtype=torch.bool, device="cpu")
    end = 0
    try:
        if streamer is not None:
            streamer.put(ids.cpu())
        decoder.prefill(ids, mask, [request.sampling for request in requests])
        for token in tokens(decoder, new):
            token = torch.where(finished, pad, token)
            refuse_not_finite(token, t + end)
            generated[:, end] = token
            end += 1
            if streamer is not None:
                streamer.put(token)
            finished |= stopping(generated[:, :end])
            if finished.all():
                break
    except KeyboardInterrupt:
        pass
    finally:
        if streamer is not None:
            streamer.end()
    decoders.give_back(decoder)
    return generated[:, :end]


def stack_prompts(requests: Sequence[Request]) -> tuple[Tensor, Tensor | None]:
    """ids :: [b, t], and mask :: [b, t], 0 for padding; None: there is none. The requests' ids are
    of one length."""
    ids = torch.stack([request.ids for request in requests])
    padding = torch.tensor([request.padding for request in requests], device=ids.device)
    if not padding.any():
        return ids, None
    return ids, (torch.arange(ids.shape[1], device=ids.device) >= padding.unsqueeze(1)).long()


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
