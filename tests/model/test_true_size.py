"""Runs Gemma 4 E2B, and one layer of 26B-A4B, at their true sizes on the CPU, in bfloat16, with
random weights."""

from dataclasses import replace

import pytest
import torch
import transformers
from transformers.initialization import no_init_weights

from gemma_fast.benchmarks.model.transformers_model import transformers_config
from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.checkpoint.random import RandomCheckpoint
from gemma_fast.config import GemmaConfig
from gemma_fast.memory import free_bytes
from gemma_fast.presets import PRESETS

E2B, LARGE = PRESETS["gemma-4-e2b"], PRESETS["gemma-4-26b-a4b"]
# Model → bytes: weights, copies of fused weights, and what tests take.
ONE_LAYER = replace(LARGE, num_hidden_layers=1, layer_types=LARGE.layer_types[-1:])
NEEDED = {"E2B": (E2B, 16e9), "one layer of 26B-A4B": (ONE_LAYER, 6e9)}


def random_hf_model(config: GemmaConfig) -> transformers.PreTrainedModel:
    """Returns transformers' model. Its values repeat, because drawing billions takes minutes."""
    source = RandomCheckpoint(config)
    with no_init_weights():
        hf = transformers.AutoModelForCausalLM.from_config(
            transformers_config(source.config), attn_implementation="eager", dtype=torch.bfloat16
        )
    hf.tie_weights()
    buffers = {name: x for name, x in hf.named_buffers() if name in source.shapes}
    drawn = torch.randn(4_000_037).mul_(0.02)  # a prime number: rows of a table differ
    for name, tensor in (dict(hf.named_parameters()) | buffers).items():
        mean = source.mean(name) if name in source.shapes else 0.0  # stacked experts
        for part in tensor.data.view(-1).split(len(drawn)):
            part.copy_(drawn[: len(part)] + mean)
        drawn = drawn.roll(7919)
    return hf.eval().requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "needed"), NEEDED.values(), ids=NEEDED)
def test_model_predicts_the_token_that_transformers_predicts(config, needed):
    if free_bytes(torch.device("cpu")) < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free memory")
    hf = random_hf_model(config)
    ids = torch.randint(3, 262_144, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = hf(ids, logits_to_keep=1).logits.float()
    model = GemmaForCausalLM.from_transformers(hf)
    assert model.config == config
    found = model(ids, logits_to_keep=1).logits.float()
    assert found.argmax() == expected.argmax()
    assert expected.std() > 0.3, "almost equal logits cannot show errors"
    assert (found - expected).std() < 0.05 * expected.std()
    token = model.generate(ids, max_new_tokens=1, eos_token_id=[])[0, -1]
    assert token == expected.argmax()
