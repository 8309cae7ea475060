"""Converts the tensor names of transformers' Gemma models to one set of names.

| saved from | prefix of the text model's tensors | prefix of the head |
|---|---|---|
| GemmaForCausalLM | `model.` | `lm_head.` |
| GemmaModel (AutoModel) | none | no head |
| Gemma3ForConditionalGeneration | `model.language_model.` | `lm_head.` |
| the same in transformers 4 | `language_model.model.` | `language_model.lm_head.` |
| Gemma3Model (AutoModel) | `language_model.` | no head |
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

_TEXT = re.compile(
    r"(?:(?:model\.)?language_model\.)?(?:model\.)?((?:embed_tokens|layers|norm)\..+)"
)
_HEAD = re.compile(r"(?:(?:model\.)?language_model\.)?lm_head\.weight")
_VISION = re.compile(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\.")
# Tensors that are computed from the config, and heads of other tasks. transformers ignores them.
_NO_WEIGHT = re.compile(r"(?:.+\.)?(?:rotary_emb\..+|embed_scale)|(?:v_head|score)\..+")


def text_name(stored: str) -> str | None:
    """Returns the name of a tensor in GemmaForCausalLM; the stored name if it is unknown; None for
    a tensor that is not part of the text model."""
    if _VISION.match(stored) or _NO_WEIGHT.fullmatch(stored):
        return None
    if _HEAD.fullmatch(stored):
        return "lm_head.weight"
    match = _TEXT.fullmatch(stored)
    return f"model.{match[1]}" if match else stored


def warn_of_skipped(source: object, stored: Iterable[str]) -> None:
    """Warns of those tensors that are skipped, except the vision part of a multimodal model."""
    skipped = [name for name in stored if text_name(name) is None and not _VISION.match(name)]
    if skipped:
        warnings.warn(
            f"{source}: {len(skipped)} tensors are no weights of the model and were not read:"
            f" {', '.join(skipped[:3])}{', …' * (len(skipped) > 3)}",
            stacklevel=2,
        )
