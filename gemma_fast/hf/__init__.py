"""Runs a transformers model on this project's kernels, after one call.

    from gemma_fast.hf import accelerate
    accelerate(model)                      # any transformers model with a Gemma 1 to 4 decoder

After this call, the model's norms, MLPs, routers, experts, attention and quantized linears run on
the kernels. The model's class, config file, weights, `generate`, caches and adapters do not change.
If the kernels do not support a call of a module, transformers' own code runs, with one warning;
`explain` lists these modules. On a CPU, C kernels or PyTorch references run. Needs the extra
`hf`, with transformers 5.17 or newer.

swap.py inserts and removes the kernels, and reports which code runs. find.py finds the modules that
the kernels can replace; experts.py has the rules for routers and experts. layers.py defines the
modules that replace them. packed.py reads the weights of quantized linears. masks.py builds masks,
attention.py computes attention, and cache.py defines GemmaFastCache.

May import: kernels.
"""

OLDEST, TOO_NEW = "5.17", "6"

try:
    import transformers
    from packaging.version import Version
except ImportError as error:
    raise ImportError(
        "gemma_fast.hf needs transformers, which is not installed: pip install 'gemma_fast[hf]'"
    ) from error
if not Version(OLDEST) <= Version(transformers.__version__) < Version(TOO_NEW):
    raise ImportError(
        f"gemma_fast.hf supports transformers from {OLDEST} to below {TOO_NEW}, but found "
        f"{transformers.__version__}: pip install 'gemma_fast[hf]'"
    )

from gemma_fast.hf.cache import GemmaFastCache  # noqa: E402
from gemma_fast.hf.swap import FastGemma, accelerate, accelerated, explain, restore  # noqa: E402

__all__ = ["FastGemma", "GemmaFastCache", "accelerate", "accelerated", "explain", "restore"]
