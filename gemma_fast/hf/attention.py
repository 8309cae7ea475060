"""Runs the attention of a transformers model on the kernels. transformers calls `make_mask` and
`attend`, which are registered under the attention name in the config, such as `gemma_fast+sdpa`.

If a mask combines only causality, a sliding window and left padding, it is not built. The layers
get `bounds` :: [2, b, 1, 1], int32, instead: the kernels' `query_offset` and `left_padding`,
relative to the first key. For any other mask, transformers' own code builds the mask and computes
attention: `sdpa` if the model used `sdpa` before, else `eager`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

from gemma_fast.kernels.attention import HEAD_DIMS, attention, visible_keys
from gemma_fast.kernels.decode_attention import split_attention
from gemma_fast.kernels.launch import runs_triton

PREFIX = "gemma_fast+"
RING_ERROR = (
    "GemmaFastCache needs an accelerated model, and a causal mask with padding on the left only: "
    "call gemma_fast.hf.accelerate(model), or use a DynamicCache or a StaticCache"
)
# Keywords that layers pass to attention and that do not change its result.
IDLE = {
    "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
    "return_dict", "num_items_in_batch",
}  # fmt: skip
logger = logging.get_logger(__name__)


class RingOffset:
    """The position of a ring's first key. Adding it raises ValueError on purpose: transformers' own
    masks add the offset, and they do not support rings."""

    def __init__(self, position: int | Tensor) -> None:
        self.position = position

    def __radd__(self, other: Any) -> Any:
        raise ValueError(RING_ERROR)


class Run(NamedTuple):
    """The code path of a module's last call, and the reason for it."""

    path: str  # "triton", "reference" or "transformers"
    why: str


def falls_back(module: nn.Module, part: str, x: Tensor, why: str | None) -> bool:
    """Returns True if transformers' own code must run. `why` is the reason, or None if the kernels
    can run. Records the code path for `explain`. If there is a reason, warns once, or raises
    RuntimeError if the module is strict."""
    if why and module.strict:
        raise RuntimeError(f"{part} cannot run on the kernels, which strict=True requires: {why}")
    if not torch.compiler.is_compiling():
        if why:
            logger.warning_once(
                f"gemma_fast runs transformers' code for {part}: {why}. gemma_fast.hf.explain(model"
                ", …) lists the modules."
            )
            module.run = Run("transformers", why)  # type: ignore[assignment]
        elif runs_triton(x):
            module.run = Run("triton", str(x.dtype))  # type: ignore[assignment]
        else:
            module.run = Run("reference", f"Triton does not run on {x.device}")  # type: ignore[assignment]
    return why is not None


def reason(module: nn.Module, x: Tensor, *others: Tensor) -> str | None:
    """Returns why the kernels cannot run this module on these tensors, or None if they can."""
    if module.training:
        return "the module is in training mode: call model.eval()"
    if torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (x, *others, *module.parameters())
    ):
        return "gradients are recorded, but the kernels have no backward: use torch.no_grad()"
    if x.device.type not in ("cuda", "cpu"):
        return f"device {x.device}: the kernels run on cuda"
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtype {x.dtype}: the kernels support bfloat16, float16, float32"
    return None


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
    # allow_is_causal_skip=False for a single token with a compileable cache.
    plain = not use_vmap and "allow_is_bidirectional_skip" not in rest
    if not allow_is_causal_skip:
        plain &= q_length == 1 and _is_causal(mask_function)
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
    bounds = torch.stack((torch.zeros_like(first) + (q_offset - offset), first - offset))
    return bounds.int().view(2, batch_size, 1, 1)


def _is_causal(mask_function: Callable[..., Any]) -> bool:
    """Returns True for transformers' causal mask, with or without a window. False for masks that
    also let image tokens attend to each other (or_masks). Dynamo can read the name, too."""
    return mask_function.__qualname__.startswith(("causal_mask_function", "and_masks"))


def left_padding(mask: Tensor, end: int | Tensor) -> tuple[Tensor, Tensor]:
    """Returns first :: [b], the first visible position of each row, and whole, a bool tensor. whole
    is False if a row hides a position after its first visible one, or if the mask has fewer than
    `end` positions. mask :: [b, positions], bool. Positions from `end` on are ignored."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    seen = mask | (positions >= end)
    first = (~seen).cumprod(dim=1).sum(dim=1)
    whole = (seen.sum(dim=1) == mask.shape[1] - first).all() & (end <= mask.shape[1])
    return first, whole


def attend(
    original: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """Implements transformers' attention interface. query :: [b, n * m, t, d]; key, value ::
    [b, n, s, d] of cached and new tokens; query and key are already rotated. Returns the output,
    [b, t, n * m, d], and the attention weights, or None if they were not stored."""
    bounds = attention_mask if is_bounds(attention_mask) else None
    accelerated = hasattr(module, "part")  # False in another model with the same config
    if accelerated:
        why = reason(module, query, key, value)
        why = why or _reason(module, query, key, value, bounds, dropout, rest)
    if not accelerated or falls_back(module, "attention", query, why):
        if bounds is not None:
            attention_mask = _mask(original, query, key, bounds, sliding_window)
        caps = {} if softcap is None else {"softcap": softcap}
        return _original(original, module)(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **caps, **rest,
        )  # fmt: skip
    assert bounds is not None
    (b, heads, t, d), n = query.shape, key.shape[1]
    query_offset, left_padding = bounds.view(2, b)
    if key.stride() != value.stride() or key.stride(3) != 1:
        # contiguous() is not enough: if a dimension has size 1, the strides may remain different.
        key, value = torch.stack((key, value))
    options: Any = {"scale": scaling, "window": sliding_window, "softcap": softcap}
    if t == 1:
        counter = torch.zeros(b * n, dtype=torch.int32, device=query.device)
        out = split_attention(
            query[:, :, 0], key, value, query_offset, left_padding, counter, **options
        )
        return out.view(b, 1, heads, d), None
    query = query.transpose(1, 2)
    return attention(
        query, key, value, None, None, query_offset, left_padding=left_padding, **options
    ), None


def is_bounds(mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype == torch.int32 and mask.shape[2:] == (1, 1)


def _reason(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor | None,
    dropout: float,
    rest: dict[str, Any],
) -> str | None:
    if bounds is None:
        return (
            "the mask hides more than causality, a sliding window and left padding, or it was first"
            " read inside torch.compile"
        )
    if dropout:
        return f"dropout {dropout}: the kernels have no dropout; set it to 0"
    if rest.get("output_attentions") or module.config.output_attentions:  # type: ignore[union-attr]
        return "output_attentions needs the attention weights, which the kernels do not store"
    unknown = [name for name, x in rest.items() if x is not None and name not in IDLE]
    if unknown:
        return f"{', '.join(unknown)}: unknown keywords of attention"
    if not query.dtype == key.dtype == value.dtype:
        return f"queries, keys, values are {query.dtype}, {key.dtype}, {value.dtype}: not one dtype"
    if query.is_cuda and query.shape[3] not in HEAD_DIMS:
        return f"head_dim {query.shape[3]}: the kernels support {HEAD_DIMS}"
    return None


def fallback(original: str) -> str:
    """Returns the name of the attention that runs if the kernels cannot: sdpa if the original is
    sdpa, else eager."""
    return original if original == "sdpa" else "eager"


def _original(original: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    theirs = next(c for c in type(module).__mro__ if c.__module__.startswith("transformers."))
    eager = sys.modules[theirs.__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(fallback(original), eager)


def _mask(original: str, query: Tensor, key: Tensor, bounds: Tensor, window: int | None) -> Tensor:
    """Returns the mask that `bounds` describe, [b, 1, t, s]: bool for sdpa; for eager, the values
    that are added to the scores."""
    query_offset, left_padding = bounds.view(2, -1)
    visible = visible_keys(
        query_offset, left_padding, query.shape[2], key.shape[2], window
    ).unsqueeze(1)
    if fallback(original) == "sdpa":
        return visible
    lowest = torch.finfo(query.dtype).min
    return torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, lowest)


def register(original: str) -> str:
    """Registers attention on the kernels, with fallback(original) for calls that the kernels do not
    support. Returns the registered name."""
    name = PREFIX + original
    AttentionInterface.register(name, partial(attend, original))
    AttentionMaskInterface.register(name, partial(make_mask, original))
    return name


# The config of a model that was pickled while it was accelerated contains one of these names.
for name in ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()):
    register(name)
