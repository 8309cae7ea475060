"""`generate_tokens` is the main loop of generate(), from requests to new tokens:

    prefill the cache with the prompts → sample a token → decode step → sample a token → … → stop

decoder.py implements prefill and the decode step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gemma_fast.engine.decoder import Decoder, Record
from gemma_fast.engine.pool import DecoderPool
from gemma_fast.engine.processors import check_methods
from gemma_fast.engine.request import Request
from gemma_fast.engine.sampler import Processor
from gemma_fast.engine.stopping import Criterion, Stopping, ended_by
from gemma_fast.model.gemma import Gemma


@torch.no_grad()
def generate_tokens(
    model: Gemma, decoders: DecoderPool, requests: Sequence[Request], tokenizer: Any, streamer: Any,
    processors: Sequence[Processor] = (), criteria: Sequence[Criterion] = (),
    record: Record | None = None,
) -> Tensor:  # fmt: skip
    """Returns ids :: [b, t + new]: the prompts and the new tokens. A row that ends early is filled
    with its request's pad_token_id, if there is one.

    tokenizer   decodes generated tokens to find stop strings; needed only if a request has them
    streamer    None, or an object: put(ids) is called with the prompts, then with each new token;
                end() is called last
    processors  functions that change logits
    criteria    functions that end texts
    record      list to which the logits of each new token are appended

    Ctrl-C ends generation and returns the tokens generated until then. Raises ValueError if logits
    are not finite, and torch.OutOfMemoryError if the cache does not fit.
    """
    check_methods("streamer", streamer, "put", "end")
    stoppings = [Stopping(request, tokenizer) for request in requests]
    ids, mask = stack_prompts(requests)
    b, t = ids.shape
    new = max(request.max_new_tokens for request in requests)
    pad, fills = pads_of(requests)
    decoder = decoders.take(model, b, t + new)
    generated = pad.unsqueeze(1).repeat(1, new)
    finished = torch.zeros(b, dtype=torch.bool, device="cpu")
    changed = bool(processors) or any(request.sampling.changes_logits for request in requests)
    end = 0
    try:
        if streamer is not None:
            streamer.put(ids.cpu())
        decoder.prefill(ids, mask, [request.sampling for request in requests], processors, record)
        for token in tokens(decoder, new):
            refuse_not_finite(token.where(~(finished & fills), 0), t + end, changed)
            token = torch.where(finished & fills, pad, token)
            generated[:, end] = token
            end += 1
            if not decoder.ahead:  # processors see padding after the end of a text
                decoder.token.copy_(token)
            if streamer is not None:
                streamer.put(token)
            for row in (~finished).nonzero().flatten().tolist():
                finished[row] = stoppings[row](int(token[row])) is not None
            if criteria:
                text = torch.cat((ids, generated[:, :end].to(ids.device)), dim=1)
                finished |= ended_by(criteria, text)
            if finished.all():
                break
            refuse_padding(pad[finished & fills], model.config.vocab_size)
    except KeyboardInterrupt:
        pass
    finally:
        if streamer is not None:
            streamer.end()
    decoders.give_back(decoder)
    return torch.cat((ids, generated[:, :end].to(ids.device)), dim=1)


def stack_prompts(requests: Sequence[Request]) -> tuple[Tensor, Tensor | None]:
    """Returns ids :: [b, t], and mask :: [b, t], 0 for padding, or None if there is no padding.

    The ids of all requests must have the same length, left padding included.
    """
    ids = torch.stack([request.ids for request in requests])
    padding = torch.tensor([request.padding for request in requests], device=ids.device)
    if not padding.any():
        return ids, None
    return ids, (torch.arange(ids.shape[1], device=ids.device) >= padding.unsqueeze(1)).long()


def pads_of(requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
    """Returns pad :: [b], the token that fills each row, and fills :: [b], False where there is
    none, on the host."""
    pads = [request.pad_token_id for request in requests]
    pad = torch.tensor([0 if token is None else token for token in pads], device="cpu")
    return pad, torch.tensor([token is not None for token in pads], device="cpu")


def tokens(decoder: Decoder, count: int) -> Iterator[Tensor]:
    """Yields the next token of each row :: [b], on the host, `count` times.

    A GPU computes the next token while the caller processes the token that was yielded, unless
    `decoder.ahead` is False.
    """
    ahead = decoder.ahead
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


def refuse_padding(pad: Tensor, vocab_size: int) -> None:
    """Raises ValueError if the model would have to read padding outside the vocabulary."""
    for token in pad.tolist():
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"pad_token_id={token} is outside the vocabulary of {vocab_size}, but a row that"
                " has ended must be padded: pass pad_token_id=0, or generate one row at a time"
            )


def refuse_not_finite(token: Tensor, tokens: int, changed: bool) -> None:
    """Raises ValueError if a token is -1, which means that its logits are not finite.

    token    [b], the newest token of each row
    tokens   number of tokens before it, for the message
    changed  True if options or functions of the call change logits
    """
    rows = (token < 0).nonzero().flatten().tolist()
    if rows:
        raise not_finite(tokens, changed, f", in rows {rows}")


def not_finite(tokens: int, changed: bool, where: str = "") -> ValueError:
    """Returns the error of logits that are not finite, see refuse_not_finite."""
    cause = (
        "options such as suppress_tokens exclude every token, or a logits_processor returned"
        " nan or inf; if the error remains without them, "
    )
    return ValueError(
        f"the logits after {tokens} tokens are not finite{where}: {cause if changed else ''}the"
        " weights are damaged, or values overflow this dtype; try dtype='float32'"
    )
