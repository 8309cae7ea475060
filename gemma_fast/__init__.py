"""Gemma 1 to 4 (text) on Triton kernels. Each kernel has a formula, a PyTorch fallback and tests.

from gemma_fast import GemmaForCausalLM, Tokenizer
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers treat a name as exported if it is imported with `as`
    from gemma_fast.causal_lm import AutoModelForCausalLM as AutoModelForCausalLM
    from gemma_fast.causal_lm import Gemma2ForCausalLM as Gemma2ForCausalLM
    from gemma_fast.causal_lm import Gemma3ForCausalLM as Gemma3ForCausalLM
    from gemma_fast.causal_lm import Gemma4ForCausalLM as Gemma4ForCausalLM
    from gemma_fast.causal_lm import Gemma4UnifiedForCausalLM as Gemma4UnifiedForCausalLM
    from gemma_fast.causal_lm import GemmaForCausalLM as GemmaForCausalLM
    from gemma_fast.config import GemmaConfig as GemmaConfig
    from gemma_fast.engine.options import GenerationConfig as GenerationConfig
    from gemma_fast.model.cache import KVCache as KVCache
    from gemma_fast.presets import PRESETS as PRESETS
    from gemma_fast.reference import Reference as Reference
    from gemma_fast.text.streaming import ChatStreamer as ChatStreamer
    from gemma_fast.text.streaming import TextIteratorStreamer as TextIteratorStreamer
    from gemma_fast.text.streaming import TextStreamer as TextStreamer
    from gemma_fast.text.streaming import split_thoughts as split_thoughts
    from gemma_fast.text.tokenizer import AutoTokenizer as AutoTokenizer
    from gemma_fast.text.tokenizer import GemmaTokenizer as GemmaTokenizer
    from gemma_fast.text.tokenizer import Tokenizer as Tokenizer

__version__ = "0.1.0"

# Public name → module that defines it. A module is imported when one of its names is first used, so
# code that needs only a kernel does not import the modules for checkpoints and text.
_MODULES = {
    "AutoModelForCausalLM": "causal_lm",
    "AutoTokenizer": "text.tokenizer",
    "ChatStreamer": "text.streaming",
    "GemmaConfig": "config",
    "GemmaForCausalLM": "causal_lm",
    "Gemma2ForCausalLM": "causal_lm",
    "Gemma3ForCausalLM": "causal_lm",
    "Gemma4ForCausalLM": "causal_lm",
    "Gemma4UnifiedForCausalLM": "causal_lm",
    "GemmaTokenizer": "text.tokenizer",
    "GenerationConfig": "engine.options",
    "KVCache": "model.cache",
    "PRESETS": "presets",
    "Reference": "reference",
    "TextIteratorStreamer": "text.streaming",
    "TextStreamer": "text.streaming",
    "Tokenizer": "text.tokenizer",
    "split_thoughts": "text.streaming",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
