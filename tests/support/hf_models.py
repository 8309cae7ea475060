"""Makes tiny transformers models and prompts, and calls the models, for tests of gemma_fast.hf."""

import torch
from tiny_models import CONFIGS, random_transformers_model, two_layers

from gemma_fast.hf import explain

FAMILIES = ["gemma-mqa", "gemma2-gqa", "gemma3-gqa"]
B, T = 2, 30  # rows of a prompt, and tokens per row: more than the windows


def make(family, attention="eager", layers=3):
    """Returns a tiny model with 2 layers (one of each kind) or 3. Only eager attention applies
    Gemma 2's soft cap."""
    model = random_transformers_model(two_layers(family) if layers == 2 else CONFIGS[family])
    model.config._attn_implementation = attention
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


def why(model, **inputs):
    """Returns {part of the model: (path, reason)}: the path that the part takes in this call, and
    why."""
    reasons = {}
    for line in explain(model, **inputs):
        reasons.setdefault(line.part, set()).add((line.path, line.why))
    assert all(len(reason) == 1 for reason in reasons.values()), "paths of layers differ"
    return {part: reason.pop() for part, reason in reasons.items()}
