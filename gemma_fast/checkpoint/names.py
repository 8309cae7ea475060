"""Converts the tensor names of transformers' Gemma models to one set of names.

| saved from | prefix of the text model's tensors | prefix of the head |
|---|---|---|
| GemmaForCausalLM | `model.` | `lm_head.` |
| GemmaModel (AutoModel) | none | no head |
| Gemma3ForConditionalGeneration, Gemma 4's | `model.language_model.` | `lm_head.` |
| Gemma 3's in transformers 4 | `language_model.model.` | `language_model.lm_head.` |
| Gemma3Model (AutoModel) | `language_model.` | no head |
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

from gemma_fast.config import GemmaConfig

_TEXT = re.compile(
    r"(?:(?:model\.)?language_model\.)?(?:model\.)?"
    r"((?:embed_tokens(?:_per_layer)?|layers|norm|per_layer_(?:model_projection|projection_norm))\..+)"
)
_HEAD = re.compile(r"(?:(?:model\.)?language_model\.)?lm_head\.(.+)")
_NOT_TEXT = re.compile(
    r"(?:model\.)?(?:vision_tower|multi_modal_projector|audio_tower|embed_vision|embed_audio"
    r"|vision_embedder)\."
)
_KEYS_AND_VALUES = re.compile(
    r"model\.layers\.(0|[1-9]\d{0,2})\.self_attn\.(?:[kv]_proj|[kv]_norm)\.weight", re.ASCII
)
# Tensors that are computed from the config, and heads of other tasks. transformers ignores them.
_NO_WEIGHT = re.compile(r"(?:.+\.)?(?:rotary_emb\..+|embed_scale)|(?:v_head|score)\..+")


def text_name(stored: str) -> str | None:
    """Returns the name of a tensor in GemmaForCausalLM; the stored name if it is unknown; None for
    a tensor that is not part of the text model."""
    if _NOT_TEXT.match(stored) or _NO_WEIGHT.fullmatch(stored):
        return None
    if match := _HEAD.fullmatch(stored):
        return f"lm_head.{match[1]}"
    match = _TEXT.fullmatch(stored)
    return f"model.{match[1]}" if match else stored


def is_unused(name: str, config: GemmaConfig) -> bool:
    """Returns True for a weight of keys or values in a layer that reads those of an earlier layer.
    Files on the hub contain them, and transformers ignores them."""
    match = _KEYS_AND_VALUES.fullmatch(name)
    layer = int(match[1]) if match else config.num_hidden_layers
    return layer < config.num_hidden_layers and config.layers[layer].kv_layer != layer


def warn_of_skipped(source: object, stored: Iterable[str]) -> None:
    """Warns of those tensors that are skipped, except the vision and audio parts of a multimodal
    model."""
    skipped = [name for name in stored if text_name(name) is None and not _NOT_TEXT.match(name)]
    if skipped:
        warnings.warn(
            f"{source}: {len(skipped)} tensors are no weights of the model and were not read:"
            f" {', '.join(skipped[:3])}{', …' * (len(skipped) > 3)}",
            stacklevel=2,
        )
