"""Makes tiny transformers models and prompts, and calls the models, for tests of gemma_fast.hf."""

import copy

import torch
import transformers
from tiny_models import CONFIGS, random_transformers_model, randomize, two_layers

from gemma_fast.hf import explain

_GEMMA4 = {
    "vocab_size": 199, "vocab_size_per_layer_input": 199, "hidden_size": 48,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "global_head_dim": 64, "intermediate_size": 88, "sliding_window": 13, "rms_norm_eps": 0.01,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "max_position_embeddings": 256,
    "final_logit_softcapping": 3.0, "hidden_size_per_layer_input": 0, "eos_token_id": None,
}  # fmt: skip
_K_IS_V = _GEMMA4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
_PER_LAYER = {"hidden_size_per_layer_input": 16}
# In transformers, layers that share keys and values need per-layer embeddings.
_SHARED = _PER_LAYER | {"num_kv_shared_layers": 2, "use_double_wide_mlp": True}
_EXPERTS = {
    "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24,
}  # fmt: skip
GEMMA4 = {
    "gemma4": _K_IS_V | _SHARED | _EXPERTS,
    "gemma4-k-is-v": _K_IS_V,
    "gemma4-per-layer": _GEMMA4 | _PER_LAYER,
    "gemma4-shared": _GEMMA4 | _SHARED,
    "gemma4-experts": _K_IS_V | _EXPERTS,
    "gemma4-unified": _K_IS_V,
}
FAMILIES = ["gemma-mqa", "gemma2-gqa", "gemma3-gqa", "gemma4"]
B, T = 2, 30  # rows of a prompt, and tokens per row: more than the windows
NEW = 24  # tokens that `generate` adds; more than the size of the windows
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
RENAMED = VERSION >= (5, 24)  # `past_key_values` is called `cache`


def make(family, attention="eager", layers=3):
    """Returns a tiny model with 2 layers (one of each kind) or 3; Gemma 4 always has 4. Only eager
    attention applies Gemma 2's soft cap."""
    if family in GEMMA4:
        return randomize(_gemma4(family, attention))
    model = random_transformers_model(two_layers(family) if layers == 2 else CONFIGS[family])
    model.config._attn_implementation = attention
    return model


def _gemma4(family, attention):
    kind = "Gemma4Unified" if family == "gemma4-unified" else "Gemma4"
    config = getattr(transformers, f"{kind}TextConfig")(**copy.deepcopy(GEMMA4[family]))
    model = getattr(transformers, f"{kind}ForCausalLM")
    model = model._from_config(config, attn_implementation=attention)
    model.config._experts_implementation = "eager"  # the truth; the default has no float64
    return model


def prompt(b=B, t=T, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 199, (b, t), generator=generator)


def padded(ids, *padding):
    """Returns an attention mask that hides the first padding[i] tokens of row i."""
    return (torch.arange(ids.shape[1]) >= torch.tensor(padding).unsqueeze(1)).long()


@torch.no_grad()
def logits(model, ids, mask=None, **options):
    return model(input_ids=ids, attention_mask=mask, **options).logits


def generate(model, ids, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    torch.manual_seed(7)
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    return model.generate(ids, attention_mask=mask, **options)


def why(model, **inputs):
    """Returns {part of the model: (path, reason)}: the path that the part takes in this call, and
    why."""
    reasons = {}
    for line in explain(model, **inputs):
        reasons.setdefault(line.part, set()).add((line.path, line.why))
    assert all(len(reason) == 1 for reason in reasons.values()), "paths of layers differ"
    return {part: reason.pop() for part, reason in reasons.items()}
