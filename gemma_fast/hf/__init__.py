"""The kernels inside a transformers model: two lines, the same model, the same words.

    from gemma_fast.hf import accelerate
    accelerate(model)                      # GemmaForCausalLM, Gemma2ForCausalLM, Gemma3ForCausalLM

Norms, MLPs and attention of the model run on the kernels from then on; class, config file, weights,
`generate`, caches, adapters stay what they were. What the kernels do not take, transformers' own
code does, and says so once: `explain` lists it. On the CPU the kernels' references run.
Extra `hf`; transformers from 5.17.

swap.py puts them in, takes them out, explains; layers.py has norms and MLPs, attention.py masks and
attention, cache.py GemmaFastCache.

May import: kernels.
"""

OLDEST, BEYOND = "5.17", "6"

try:
    import transformers
    from packaging.version import Version
except ImportError as error:
    raise ImportError(
        "gemma_fast.hf needs transformers, which is not installed: pip install 'gemma_fast[hf]'"
    ) from error
if not Version(OLDEST) <= Version(transformers.__version__) < Version(BEYOND):
    raise ImportError(
        f"gemma_fast.hf supports transformers from {OLDEST} to below {BEYOND}, and found "
        f"{transformers.__version__}: pip install 'gemma_fast[hf]'"
    )

from gemma_fast.hf.cache import GemmaFastCache  # noqa: E402
from gemma_fast.hf.swap import FastGemma, accelerate, accelerated, explain, restore  # noqa: E402

__all__ = ["FastGemma", "GemmaFastCache", "accelerate", "accelerated", "explain", "restore"]
