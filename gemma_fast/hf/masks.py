"""Builds the masks of a transformers model on the kernels. transformers calls `make_mask`, which is
registered under the attention name in the config, such as `gemma_fast+sdpa`.

If a mask combines only causality, a sliding window and left padding, it is not built. The layers
get `bounds` :: [2, b, t, 1], int32, instead: for each new token its position, and the first visible
position of its row, both relative to the first key. So `bounds` have the queries in the same
dimension as a mask: Gemma 4 slices it where it computes its last layers for the last tokens only
(`logits_to_keep`). Any other mask, such as a bidirectional one, is built by transformers' own code,
and transformers' own attention applies it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.utils.import_utils import is_tracing

from gemma_fast.kernels.attention import visible_keys

RING_ERROR = (
    "GemmaFastCache needs an accelerated model, and a causal mask with padding on the left only: "
    "call gemma_fast.hf.accelerate(model), or use a DynamicCache or a StaticCache"
)


class RingOffset:
    """The position of a ring's first key. Adding it raises ValueError on purpose: transformers' own
    masks add the offset, and they do not support rings."""

    def __init__(self, position: int | Tensor) -> None:
        self.position = position

    def __radd__(self, other: Any) -> Any:
        raise ValueError(RING_ERROR)


def make_mask(
    original: str,
    *,
    batch_size: int,
    q_length: int,
    mask_function: Callable[..., Any],
    q_offset: int | Tensor = 0,
    kv_offset: int | RingOffset = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **rest: Any,
) -> Tensor | None:
    """Implements transformers' mask interface. attention_mask :: [b, past + t], bool. Returns
    `bounds`, or transformers' own mask if `bounds` cannot express the mask."""
    # transformers passes use_vmap=True or allow_is_causal_skip=False for masks that are not plain,
    # and allow_is_bidirectional_skip for bidirectional masks. But it also passes
    # allow_is_causal_skip=False for a single token with a compileable cache, and multimodal Gemma 4
    # passes blocks of image tokens for a text without images, too.
    plain = not use_vmap and (allow_is_causal_skip or (q_length == 1 and _is_causal(mask_function)))
    if not plain and not torch.compiler.is_compiling():
        plain = _has_only_empty_blocks(mask_function)
    plain &= "allow_is_bidirectional_skip" not in rest
    ring = isinstance(kv_offset, RingOffset)
    first = torch.zeros(batch_size, dtype=torch.long, device=device)
    if plain and attention_mask is not None:
        first, whole = left_padding(attention_mask, q_offset + q_length)
        if not is_tracing(attention_mask):
            plain = bool(whole)
        elif ring:
            torch._assert_async(whole, RING_ERROR)
        else:
            plain = False
    if not plain:
        if ring:
            raise ValueError(RING_ERROR)
        return ALL_MASK_ATTENTION_FUNCTIONS[fallback(original)](
            batch_size=batch_size, q_length=q_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, use_vmap=use_vmap,
            allow_is_causal_skip=allow_is_causal_skip, device=device, **rest,
        )  # fmt: skip
    offset = kv_offset.position if isinstance(kv_offset, RingOffset) else kv_offset
    positions = torch.arange(q_length, device=device) + (q_offset - offset)
    bounds = torch.stack(torch.broadcast_tensors(positions, (first - offset).unsqueeze(1)))
    return bounds.int().unsqueeze(3)


def _is_causal(mask_function: Callable[..., Any]) -> bool:
    """Returns True for transformers' causal mask, with or without a window. False for masks that
    also let image tokens attend to each other (or_masks). Dynamo can trace both comparisons."""
    return (
        mask_function is causal_mask_function
        or getattr(mask_function, "__name__", "") == "and_mask"
    )


def _has_only_empty_blocks(mask_function: Callable[..., Any]) -> bool:
    """Returns True for transformers' causal mask, with or without a window, that is combined with
    blocks of image tokens, if no token belongs to a block."""
    kind, parts = _maker(mask_function)
    if kind not in ("and_masks", "or_masks") or len(parts["mask_functions"]) != 2:
        return False
    first, last = parts["mask_functions"]
    last_kind, last_parts = _maker(last)
    if kind == "and_masks":  # adds a window after the blocks
        return last_kind == "sliding_window_overlay" and _has_only_empty_blocks(first)
    causal = _maker(first)[1].get("mask_functions", (first,))
    return (
        {_maker(x)[0] for x in causal} <= {"sliding_window_overlay", "causal_mask_function"}
        and last_kind == "blockwise_overlay"
        and bool((last_parts["block_sequence_ids"] < 0).all())
    )


def _maker(mask_function: Callable[..., Any]) -> tuple[str, Mapping[str, Any]]:
    """Returns the name of the function of transformers that returned this mask function, and its
    arguments. The name is "" for other mask functions."""
    if getattr(mask_function, "__module__", None) != causal_mask_function.__module__:
        return "", {}
    name = mask_function.__qualname__.partition(".")[0]
    return name, inspect.getclosurevars(mask_function).nonlocals


def left_padding(mask: Tensor, end: int | Tensor) -> tuple[Tensor, Tensor]:
    """Returns first :: [b], the first visible position of each row, and whole, a bool tensor. whole
    is False if a row hides a position after its first visible one, or if the mask has fewer than
    `end` positions. mask :: [b, positions], bool. Positions from `end` on are ignored."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    seen = mask | (positions >= end)
    first = (~seen).cumprod(dim=1).sum(dim=1)
    whole = (seen.sum(dim=1) == mask.shape[1] - first).all() & (end <= mask.shape[1])
    return first, whole


def is_bounds(mask: Any) -> bool:
    return (
        isinstance(mask, Tensor)
        and mask.dtype == torch.int32
        and mask.ndim == 4
        and (mask.shape[0], mask.shape[3]) == (2, 1)
    )


def unpack(bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Returns query_offset, the position of the first query, and left_padding, both [b], int32."""
    query_offset, left_padding = bounds[:, :, 0, 0].contiguous()
    return query_offset, left_padding


def fallback(original: str) -> str:
    """Returns the name of the attention that runs if the kernels cannot: sdpa if the original is
    sdpa, else eager."""
    return original if original == "sdpa" else "eager"


def mask_of_bounds(
    original: str, query: Tensor, key: Tensor, bounds: Tensor, window: int | None
) -> Tensor:
    """Returns the mask that `bounds` describe, [b, 1, t, s]: bool for sdpa; for eager, the values
    that are added to the scores."""
    visible = visible_keys(*unpack(bounds), query.shape[2], key.shape[2], window).unsqueeze(1)
    if fallback(original) == "sdpa":
        return visible
    lowest = torch.finfo(query.dtype).min
    return torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, lowest)
