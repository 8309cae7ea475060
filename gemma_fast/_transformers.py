"""What gemma_fast.hf takes from transformers, after a look at its version."""

from __future__ import annotations

OLDEST, BEYOND = "5.17", "6"

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "gemma_fast.hf needs transformers, which is not installed: pip install 'gemma_fast[hf]'"
    ) from error
from packaging.version import Version

if not Version(OLDEST) <= Version(transformers.__version__) < Version(BEYOND):
    raise ImportError(
        f"gemma_fast.hf supports transformers from {OLDEST} to below {BEYOND}, and found "
        f"{transformers.__version__}: pip install 'gemma_fast[hf]'"
    )

from transformers import (  # noqa: E402
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Cache,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    GemmaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import StaticCache, StaticLayer, StaticSlidingWindowLayer  # noqa: E402
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402
from transformers.models.gemma.modeling_gemma import (  # noqa: E402
    GemmaAttention,
    GemmaMLP,
    GemmaRMSNorm,
)
from transformers.models.gemma2.modeling_gemma2 import (  # noqa: E402
    Gemma2Attention,
    Gemma2MLP,
    Gemma2RMSNorm,
)
from transformers.models.gemma3.modeling_gemma3 import (  # noqa: E402
    Gemma3Attention,
    Gemma3MLP,
    Gemma3RMSNorm,
)
from transformers.utils import logging  # noqa: E402
from transformers.utils.import_utils import is_tracing  # noqa: E402

__all__ = [
    "ALL_ATTENTION_FUNCTIONS", "ALL_MASK_ATTENTION_FUNCTIONS", "AttentionInterface",
    "AttentionMaskInterface", "AutoModelForCausalLM", "Cache", "Gemma2Attention",
    "Gemma2ForCausalLM", "Gemma2MLP", "Gemma2RMSNorm", "Gemma3Attention", "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration", "Gemma3MLP", "Gemma3RMSNorm", "GemmaAttention",
    "GemmaForCausalLM", "GemmaMLP", "GemmaRMSNorm", "PreTrainedConfig", "PreTrainedModel",
    "StaticCache", "StaticLayer", "StaticSlidingWindowLayer", "is_tracing", "logging",
]  # fmt: skip
