"""gemma_fast: Google's Gemma on Triton kernels, small enough to read in an afternoon.

from gemma_fast import GemmaForCausalLM, Tokenizer
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `as`: exported, to a type checker
    from gemma_fast.cache import KVCache as KVCache
    from gemma_fast.config import PRESETS as PRESETS
    from gemma_fast.config import GemmaConfig as GemmaConfig
    from gemma_fast.model import AutoModelForCausalLM as AutoModelForCausalLM
    from gemma_fast.model import Gemma2ForCausalLM as Gemma2ForCausalLM
    from gemma_fast.model import Gemma3ForCausalLM as Gemma3ForCausalLM
    from gemma_fast.model import GemmaForCausalLM as GemmaForCausalLM
    from gemma_fast.options import GenerationConfig as GenerationConfig
    from gemma_fast.reference import Reference as Reference
    from gemma_fast.streaming import TextIteratorStreamer as TextIteratorStreamer
    from gemma_fast.streaming import TextStreamer as TextStreamer
    from gemma_fast.tokenizer import AutoTokenizer as AutoTokenizer
    from gemma_fast.tokenizer import GemmaTokenizer as GemmaTokenizer
    from gemma_fast.tokenizer import Tokenizer as Tokenizer

__version__ = "0.1.0"

# Imported when first asked for: a kernel alone needs neither checkpoints nor a tokenizer.
_MODULES = {
    "AutoModelForCausalLM": "model",
    "AutoTokenizer": "tokenizer",
    "GemmaConfig": "config",
    "GemmaForCausalLM": "model",
    "Gemma2ForCausalLM": "model",
    "Gemma3ForCausalLM": "model",
    "GemmaTokenizer": "tokenizer",
    "GenerationConfig": "options",
    "KVCache": "cache",
    "PRESETS": "config",
    "Reference": "reference",
    "TextIteratorStreamer": "streaming",
    "TextStreamer": "streaming",
    "Tokenizer": "tokenizer",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
