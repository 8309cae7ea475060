"""Runs Gemma 4 E2B at its true size on the CPU, in bfloat16, with random weights."""

import pytest
import torch
import transformers
from transformers.initialization import no_init_weights

from gemma_fast.benchmarks.model.transformers_model import transformers_config
from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.checkpoint.random import RandomCheckpoint
from gemma_fast.memory import free_bytes
from gemma_fast.presets import PRESETS

NEEDED = 16e9  # bytes: 9.3 GB of weights, 2.1 GB of copies of fused weights, and what tests take


def random_hf_model() -> transformers.PreTrainedModel:
    """Returns transformers' model. Its values repeat, because drawing billions takes minutes."""
    source = RandomCheckpoint(PRESETS["gemma-4-e2b"])
    with no_init_weights():
        hf = transformers.AutoModelForCausalLM.from_config(
            transformers_config(source.config), attn_implementation="eager", dtype=torch.bfloat16
        )
    hf.tie_weights()
    tensors = dict(hf.named_parameters()) | dict(hf.named_buffers())
    drawn = torch.randn(4_000_037).mul_(0.02)  # a prime number: rows of a table differ
    for name in source.shapes:
        mean = source.mean(name)
        for part in tensors[name].data.view(-1).split(len(drawn)):
            part.copy_(drawn[: len(part)] + mean)
        drawn = drawn.roll(7919)
    return hf.eval().requires_grad_(False)


@pytest.mark.slow
@pytest.mark.skipif(free_bytes(torch.device("cpu")) < NEEDED, reason="needs 16 GB of free memory")
def test_e2b_predicts_the_token_that_transformers_predicts():
    hf = random_hf_model()
    ids = torch.randint(3, 262_144, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = hf(ids, logits_to_keep=1).logits.float()
    model = GemmaForCausalLM.from_transformers(hf)
    assert model.config == PRESETS["gemma-4-e2b"]
    found = model(ids, logits_to_keep=1).logits.float()
    assert found.argmax() == expected.argmax()
    assert expected.std() > 0.3, "almost equal logits cannot show errors"
    assert (found - expected).std() < 0.05 * expected.std()
    token = model.generate(ids, max_new_tokens=1, eos_token_id=[])[0, -1]
    assert token == expected.argmax()
