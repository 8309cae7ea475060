"""Runs the attention of a transformers model on the kernels. transformers calls `attend`, which is
registered under the attention name in the config, such as `gemma_fast+sdpa`.

For a call that the kernels do not support, transformers' own attention runs: `sdpa` if the model
used `sdpa` before, else `eager`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

from gemma_fast.hf.masks import fallback, is_bounds, make_mask, mask_of_bounds, unpack
from gemma_fast.kernels.attention import HEAD_DIMS, attention
from gemma_fast.kernels.decode_attention import split_attention
from gemma_fast.kernels.launch import runs_triton

PREFIX = "gemma_fast+"
# Keywords that layers pass to attention and that do not change its result.
IDLE = {
    "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
    "return_dict", "num_items_in_batch", "is_causal", "labels", "output_router_logits",
    "return_shared_kv_states",
}  # fmt: skip
logger = logging.get_logger(__name__)


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
    if not isinstance(attention_mask, Tensor | None):  # flex_attention's BlockMask
        raise ValueError(
            f"the mask is a {type(attention_mask).__name__}, which {fallback(original)} attention "
            "cannot read: pass a tensor, or call accelerate(model, attention=False)"
        )
    bounds = attention_mask if is_bounds(attention_mask) else None
    if bounds is not None:
        _check(original, module, query, rest)
    _check_sliced(original, query, attention_mask, rest)
    if not original.startswith("flash"):
        sliding_window = _window(module, sliding_window)
    accelerated = hasattr(module, "part")  # False in another model with the same config
    if accelerated:
        why = reason(module, query, key, value)
        why = why or _reason(module, query, key, value, bounds, dropout, rest)
    if not accelerated or falls_back(module, "attention", query, why):
        if bounds is not None:
            attention_mask = mask_of_bounds(original, query, key, bounds, sliding_window)
        caps = {} if softcap is None else {"softcap": softcap}
        return _original(original, module)(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **caps, **rest,
        )  # fmt: skip
    assert bounds is not None
    (b, heads, t, d), n = query.shape, key.shape[1]
    query_offset, left_padding = unpack(bounds)
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


def _check(original: str, module: nn.Module, query: Tensor, rest: dict[str, Any]) -> None:
    """Raises ValueError for arguments that the original attention applies, and that neither the
    kernels nor `fallback` apply: is_causal, and more keywords for flash and flex attention."""
    if original == "eager":
        return
    found: list[str] = []
    positions, causal = rest.get("position_ids"), rest.get("is_causal")
    if query.shape[2] > 1 and not (
        getattr(module, "is_causal", True) if causal is None else causal
    ):
        found.append("is_causal=False")
    if original != "sdpa":
        found += _unknown(rest)
    alone = original.startswith("flash") and query.shape[0] == 1
    if alone and positions is not None and not is_tracing(positions):
        found += ["position_ids that restart"] if (positions.diff() != 1).any() else []
    if found:
        raise ValueError(
            f"{original} honors {', '.join(found)}, but the kernels do not: call accelerate(model, "
            "attention=False)"
        )


def _check_sliced(original: str, query: Tensor, mask: Tensor | None, rest: dict[str, Any]) -> None:
    """Raises ValueError if Gemma 4's last layers get only the queries of `logits_to_keep`, but no
    mask: sdpa without a mask counts positions from the first query. transformers does not slice
    then, but it compares the attention's name with 'sdpa'."""
    positions = rest.get("position_ids")
    tokens = query.shape[2] if positions is None else positions.shape[-1]
    if original == "sdpa" and mask is None and query.shape[2] != tokens:
        raise ValueError(
            "logits_to_keep with an attention_mask of None: pass the mask as a tensor, or call "
            "accelerate(model, attention=False)"
        )


def _unknown(rest: dict[str, Any]) -> list[str]:
    return [name for name, x in rest.items() if x is not None and name not in IDLE]


def _window(module: nn.Module, window: int | None) -> int | None:
    """Returns the window that transformers' masks apply. They read it from the config at each call,
    but only flash attention reads `window`, which a layer stores when it is created."""
    config: Any = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return window
    return config.sliding_window if kinds[module.layer_idx] == "sliding_attention" else None


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
    if unknown := _unknown(rest):
        return f"{', '.join(unknown)}: unknown keywords of attention"
    if not query.dtype == key.dtype == value.dtype:
        return f"queries, keys, values are {query.dtype}, {key.dtype}, {value.dtype}: not one dtype"
    if query.is_cuda and query.shape[3] not in HEAD_DIMS:
        return f"head_dim {query.shape[3]}: the kernels support {HEAD_DIMS}"
    return None


def _original(original: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    homes = [sys.modules[kind.__module__] for kind in type(module).__mro__]
    eager = next(x.eager_attention_forward for x in homes if hasattr(x, "eager_attention_forward"))
    return ALL_ATTENTION_FUNCTIONS.get_interface(fallback(original), eager)


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
