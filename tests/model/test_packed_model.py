"""Compares models whose weights are packed, in fp32, with the reference on the same weights
unpacked: tiny models of every family in every kind of packing."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from checkpoints import ALL_FAMILIES
from gguf import GGMLQuantizationType as Type
from gguf_blocks import write_quantized
from marks import slow
from packed_checkpoints import KINDS, PackedCheckpoint
from tiny_models import CONFIGS, two_layers
from tolerances import logits_error

from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.config import GemmaConfig
from gemma_fast.kernels._skinny import MAX_ROWS
from gemma_fast.kernels.packed import PackedWeight
from gemma_fast.reference import Reference


def wide(config: GemmaConfig) -> GemmaConfig:
    """Returns the config with matrices that all have multiples of 128 columns."""
    widths = {"hidden_size": 128, "intermediate_size": 128}
    if config.hidden_size_per_layer_input:
        widths["hidden_size_per_layer_input"] = 128
    if config.num_experts:
        widths["moe_intermediate_size"] = 128
    return replace(config, **widths)


def build(config: GemmaConfig, kind: str) -> tuple[GemmaForCausalLM, Reference]:
    checkpoint = PackedCheckpoint(wide(config), kind)
    model = GemmaForCausalLM.from_checkpoint(checkpoint, dtype="float32", device="cpu")
    assert {p.ndim for p in model.parameters() if p.is_floating_point()} == {1, 2}
    packed = [x for x in model.modules() if isinstance(x, PackedWeight)]
    matrices = sum(len(shape) == 2 for shape in checkpoint.shapes.values())
    layers, experts = model.config.num_hidden_layers, model.config.num_experts
    if experts:  # a layer's experts are two weights, and its router is not packed
        matrices -= layers * (3 * experts - 2 + 1)
    fused = 2 * layers  # q, k and v are one weight; gate and up another
    assert matrices - 2 * fused <= len(packed) < matrices
    return model, Reference.from_checkpoint(checkpoint, dtype=torch.float32, device="cpu")


def padded(config: GemmaConfig, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns random prompts of these lengths, padded on the left, and their mask."""
    ids = torch.randint(3, config.vocab_size, (len(counts), max(counts)))
    mask = torch.zeros_like(ids)
    for row, count in enumerate(counts):
        mask[row, -count:] = 1
    return ids * mask, mask


def close(config: GemmaConfig, logits: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.2, "almost equal logits cannot show errors"
    error = logits_error(config, tokens=40) * float(expected.square().mean().sqrt())
    torch.testing.assert_close(logits, expected, atol=error, rtol=0)


def greedy(reference: Reference, ids, mask, steps: int) -> torch.Tensor:
    """Returns ids with the most likely tokens after them."""
    past, new = None, ids
    for _ in range(steps):
        out = reference(new, attention_mask=mask, past_key_values=past, logits_to_keep=1)
        past, new = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat((ids, new), dim=1), torch.cat((mask, torch.ones_like(new)), dim=1)
    return ids


def assert_equal(model, reference, counts: list[int], steps: int) -> None:
    """Asserts that logits of a padded batch are equal, and `steps` greedy tokens after it."""
    ids, mask = padded(model.config, counts)
    expected = reference(ids, attention_mask=mask).logits
    logits = model(ids, attention_mask=mask).logits.cpu()
    close(model.config, logits[mask.bool()], expected[mask.bool()])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=steps, eos_token_id=[])
    assert torch.equal(out.cpu(), greedy(reference, ids, mask, steps))


FEW = [
    *((name, "mixed") for name in CONFIGS),
    *((name, kind) for name in ("gemma3-gqa", "gemma4-all") for kind in KINDS),
]
ALL = [(name, kind) for name in CONFIGS for kind in KINDS]


@pytest.mark.parametrize(("name", "kind"), [*FEW, *slow(*(x for x in ALL if x not in FEW))])
def test_a_packed_model_equals_the_reference_on_unpacked_weights(name, kind):
    """A prompt, decode steps of one row, and a padded batch."""
    model, reference = build(CONFIGS[name], kind)
    assert_equal(model, reference, [19], steps=4)
    assert_equal(model, reference, [11, 3], steps=3)


@pytest.mark.parametrize("name", ["gemma2-gqa", "gemma4-per-layer"])
def test_batches_of_more_rows_than_the_kernels_for_few_rows_take_are_equal(name):
    model, reference = build(CONFIGS[name], "mixed")
    assert_equal(model, reference, [MAX_ROWS + 3, *range(1, MAX_ROWS + 1)], steps=3)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_gguf_file_of_mixed_types_equals_the_reference_on_unpacked_weights(family, tmp_path):
    """The types are those of llama.cpp's Q4_K_M."""
    more = dict.fromkeys(("v_proj", "down_proj", "embed_tokens.weight"), Type.Q6_K)
    write_quantized(tmp_path / "model.gguf", family, more, default=Type.Q4_K)
    model = GemmaForCausalLM.from_pretrained(tmp_path / "model.gguf", dtype="float32", device="cpu")
    assert model.layers[0].gate_up_proj.packing.bits == 4
    assert model.layers[0].down_proj.packing.group == 16
    assert_equal(model, Reference.from_pretrained(tmp_path / "model.gguf"), [11, 3], steps=3)


def test_generate_gives_the_same_text_twice():
    model, _ = build(CONFIGS["gemma3-gqa"], "int4-g32-minimum")
    ids = torch.tensor([[2, 5, 9]])
    first = model.generate(ids, max_new_tokens=5, eos_token_id=[])
    assert torch.equal(first, model.generate(ids, max_new_tokens=5, eos_token_id=[]))


@pytest.mark.parametrize("kind", KINDS)
def test_memory_counts_integers_and_scales(kind):
    model, _ = build(CONFIGS["gemma-mha"], kind)
    assert model.lm_head is not None
    weights, head = model.memory()["weights"], model.memory()["lm_head"]
    expected = 0
    for name, shape in model.config.tensor_shapes().items():
        if len(shape) == 1:
            expected += 4 * shape[0]
            continue
        packing = KINDS[kind](shape[1])
        size = packing.scale.itemsize * (1 + packing.minimum)
        size = shape[0] * (shape[1] * packing.bits // 8 + shape[1] // packing.group * size)
        if name == "lm_head.weight":
            assert head == size
        else:
            expected += size
    assert weights == expected


@pytest.mark.parametrize("name", ["gemma-mqa", "gemma3-gqa", "gemma4-all"])
def test_another_dtype_changes_what_is_computed_in_and_leaves_packed_weights(name):
    """The packed model is as close to float32 as one whose weights are rounded to bfloat16."""
    model, reference = build(CONFIGS[name], "mixed")
    half = deepcopy(model).to(torch.bfloat16)
    assert half.dtype == half.norm.dtype == torch.bfloat16
    for module_name, packed in model.named_modules():
        if isinstance(packed, PackedWeight):
            moved = half.get_submodule(module_name).weight
            for x, y in zip(packed.weight, moved, strict=True):
                assert x is None or (x.dtype == y.dtype and torch.equal(x, y))
    checkpoint = PackedCheckpoint(model.config, "mixed")
    unpacked = GemmaForCausalLM.from_checkpoint(
        checkpoint, dtype="bfloat16", device="cpu", quantize="none"
    )
    ids, _ = padded(model.config, [17] * 8)
    exact = reference(ids).logits
    error, theirs = ((x(ids).logits.float() - exact).norm() for x in (half, unpacked))
    assert 0 < error <= 1.05 * theirs


def test_a_packed_model_is_loaded_from_its_own_state_dict():
    model, _ = build(CONFIGS["gemma3-mqa"], "int4-g32-minimum")
    other, _ = build(CONFIGS["gemma3-mqa"], "int4-g32-minimum")
    for x in other.parameters():
        x.data.zero_()
    other.load_state_dict(model.state_dict())
    ids = torch.tensor([[2, 5, 9]])
    assert torch.equal(other(ids).logits, model(ids).logits)


ON_KERNELS = [
    ("gemma3-gqa", "mixed", [9]),
    ("gemma2-gqa", "int4-g32-minimum", [7, 3]),
]
MORE = [("gemma4-per-layer", "int4-g32", [9])]
MORE += [(name, kind, [7, 3]) for name in ("gemma3-gqa", "gemma4-per-layer") for kind in KINDS]


@pytest.mark.parametrize(("name", "kind", "counts"), [*ON_KERNELS, *slow(*MORE)], ids=str)
def test_a_packed_model_of_two_layers_on_kernels_equals_the_reference(name, kind, counts, device):
    """A prompt of more rows than MAX_ROWS, and a decode step of one row or of two."""
    model, reference = build(two_layers(name), kind)
    assert_equal(model.to(device), reference, counts, steps=2)
