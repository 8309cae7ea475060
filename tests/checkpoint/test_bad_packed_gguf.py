"""Checks that factors of quantized blocks that cannot be packed are refused."""

import re

import numpy as np
import pytest
import torch
from checkpoints import random_tensors, write_gguf
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from gguf_blocks import WIDE, random_blocks, random_bytes, set_factor
from loaded_gguf import loaded, weights

from gemma_fast.causal_lm import GemmaForCausalLM


@pytest.mark.parametrize("part", ["embed_tokens", "layers.1.self_attn.v_proj"])
@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_K], ids=lambda kind: kind.name)
def test_factors_that_are_not_finite_are_refused_with_file_and_tensor(tmp_path, part, kind):
    path, name = tmp_path / "model.gguf", f"model.{part}.weight"
    shape = random_tensors("gemma3", **WIDE)[name].shape
    blocks = random_blocks(shape, kind, 0.1)
    set_factor(blocks[-1:], kind, 0, np.inf)
    stored = {name: (blocks, kind)}
    if part != "embed_tokens":  # q, k and v are packed together
        for other in (name.replace("v_proj", "q_proj"), name.replace("v_proj", "k_proj")):
            rows = random_tensors("gemma3", **WIDE)[other].shape
            stored[other] = random_blocks(rows, kind, 0.1), kind
    write_gguf(path, stored=stored, **WIDE)
    pattern = rf"^{re.escape(str(path))}: tensor {re.escape(name)}: a scale is (inf|nan), which is"
    with pytest.raises(ValueError, match=pattern):
        loaded(path)


def test_a_scale_that_overflows_fp16_is_refused_only_in_16_bits(tmp_path):
    path, name = tmp_path / "model.gguf", "model.layers.0.mlp.down_proj.weight"
    rows = random_bytes((256, 256), Type.Q6_K, np.random.default_rng(0))
    set_factor(rows, Type.Q6_K, 0, 6e4)
    write_gguf(path, "gemma2", stored={name: (rows, Type.Q6_K)}, **WIDE)
    with pytest.raises(ValueError, match=rf"{name}: a scale of \S+ does not fit float16.*'none'"):
        GemmaForCausalLM.from_pretrained(path, dtype="float16", device="cpu")
    found = weights(loaded(path))[name]
    assert torch.equal(found, torch.from_numpy(dequantize(rows, Type.Q6_K)))
