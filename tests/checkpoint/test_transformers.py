"""Checks that the model of GemmaForCausalLM.from_transformers gives the same logits, and shares its
weights with the source. Also checks that unsupported models are refused."""

import math
from copy import deepcopy

import pytest
import torch
import transformers
from tiny_models import CONFIGS, close, random_transformers_model
from torch import nn

from gemma_fast.benchmarks.model.transformers_model import transformers_config
from gemma_fast.causal_lm import GemmaForCausalLM
from gemma_fast.config import GemmaConfig
from gemma_fast.presets import PRESETS


@pytest.fixture
def source() -> transformers.PreTrainedModel:
    return random_transformers_model(CONFIGS["gemma3-gqa"])


def refused(source: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GemmaForCausalLM.from_transformers(source)


def storages(model: nn.Module) -> dict[int, int]:
    """Returns {address: size in bytes} of the storages of all weights and buffers."""
    kept = (x.untyped_storage() for x in (*model.parameters(), *model.buffers()))
    return {storage.data_ptr(): storage.nbytes() for storage in kept}


def fused_parameters(config: GemmaConfig) -> int:
    shapes = config.tensor_shapes()
    names = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    alone = {  # in layers that read an earlier layer's keys and values
        f"model.layers.{i}.self_attn.q_proj.weight"
        for i, layer in enumerate(config.layers)
        if layer.kv_layer != i
    }
    fused = (name for name in shapes if name.split(".")[-2] in names and name not in alone)
    return sum(math.prod(shapes[name]) for name in fused if ".experts." not in name)


def test_logits_and_text_equal_transformers(twins):
    model = GemmaForCausalLM.from_transformers(twins.hf)
    assert model.config == twins.config
    ids = twins.prompt(2, 21)
    close(model(ids).logits, twins.hf(ids).logits)
    expected = twins.hf.generate(ids, max_new_tokens=9, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=9), expected)


def test_all_weights_except_the_fused_ones_are_shared(twins):
    model = GemmaForCausalLM.from_transformers(twins.hf)
    theirs, ours = storages(twins.hf), storages(model)
    copied = sum(size for place, size in ours.items() if place not in theirs)
    assert copied == 4 * fused_parameters(twins.config)
    addresses = {x.data_ptr() for x in (*twins.hf.parameters(), *twins.hf.buffers())}
    for name, weight in model.named_parameters():
        alone = len(model.parts[name]) == 1 or ".experts_" in name
        assert (weight.data_ptr() in addresses) == alone, name
        assert not weight.requires_grad


def test_sizes_in_the_docstring_of_from_transformers_are_right():
    config = PRESETS["gemma-2b"]
    q_and_kv = config.num_attention_heads + 2 * config.num_key_value_heads
    rows = q_and_kv * config.head_dim + 2 * config.intermediate_size
    assert fused_parameters(config) == config.num_hidden_layers * rows * config.hidden_size
    copied, whole = (2 * n / 1e9 for n in (fused_parameters(config), config.num_parameters))
    assert (round(copied, 2), round(whole, 2)) == (2.60, 5.01)


def test_in_place_changes_of_shared_weights_affect_both_models(source):
    model, ids = GemmaForCausalLM.from_transformers(source), torch.tensor([[2, 5, 9, 7]])
    before = model(ids).logits
    with torch.no_grad():
        source.model.layers[0].mlp.down_proj.weight.mul_(3)
        model.layers[1].o_proj.neg_()
    close(model(ids).logits, source(ids).logits)
    assert not torch.allclose(model(ids).logits, before, atol=0.01)


def test_adjacent_q_k_v_weights_are_shared(source):
    for layer in source.model.layers:
        attention = layer.self_attn
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        together = torch.cat([part.weight.data for part in parts])
        for part, rows in zip(parts, together.split([len(p.weight) for p in parts]), strict=True):
            part.weight.data = rows
    model = GemmaForCausalLM.from_transformers(source)
    for ours, theirs in zip(model.layers, source.model.layers, strict=True):
        assert ours.qkv_proj.data_ptr() == theirs.self_attn.q_proj.weight.data_ptr()
    ids = torch.tensor([[2, 5, 9, 7]])
    close(model(ids).logits, source(ids).logits)


def test_adjacent_weights_in_another_order_are_copied(source):
    attention = source.model.layers[0].self_attn
    parts = [attention.v_proj, attention.q_proj, attention.k_proj]
    together = torch.cat([part.weight.data for part in parts])
    for part, rows in zip(parts, together.split([len(p.weight) for p in parts]), strict=True):
        part.weight.data = rows
    model, ids = GemmaForCausalLM.from_transformers(source), torch.tensor([[2, 5, 9, 7]])
    close(model(ids).logits, source(ids).logits)


def test_gemma_fast_model_is_refused(source):
    with pytest.raises(ValueError, match="GemmaForCausalLM is not one of transformers'"):
        GemmaForCausalLM.from_transformers(GemmaForCausalLM.from_transformers(source))


def test_unsupported_generation_defaults_are_ignored_with_a_warning(source):
    source.generation_config.num_beams = 3
    model, ids = GemmaForCausalLM.from_transformers(source), torch.tensor([[2, 5, 9, 7]])
    with pytest.warns(UserWarning, match=r"num_beams=3 is not supported: .*ignored"):
        model.generate(ids, max_new_tokens=2)


def test_weight_that_is_not_contiguous_is_copied(source):
    weight = source.model.layers[0].self_attn.o_proj.weight
    weight.data = weight.data.T.contiguous().T
    model, ids = GemmaForCausalLM.from_transformers(source), torch.tensor([[2, 5, 9, 7]])
    assert model.layers[0].o_proj.is_contiguous()
    close(model(ids).logits, source(ids).logits)


def test_text_model_of_a_multimodal_model_is_loaded(tmp_path):
    text = transformers_config(CONFIGS["gemma3-gqa"]).to_dict()
    vision = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
    vision |= {"num_attention_heads": 1, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=198
    )
    source = transformers.Gemma3ForConditionalGeneration(config).eval()
    model, ids = GemmaForCausalLM.from_transformers(source), torch.tensor([[2, 5, 9, 7]])
    close(model(ids).logits, source(ids).logits)
    assert model.embed_tokens.data_ptr() == source.get_input_embeddings().weight.data_ptr()

    source.set_output_embeddings(nn.Linear(48, 199, bias=False))
    source.save_pretrained(tmp_path)
    hf = transformers.Gemma3ForConditionalGeneration.from_pretrained(tmp_path)
    expected = hf.eval()(ids).logits
    for model in (
        GemmaForCausalLM.from_pretrained(tmp_path, device="cpu"),
        GemmaForCausalLM.from_transformers(source),
    ):
        assert model.lm_head is not None
        close(model(ids).logits, expected)


def test_dtype_and_generation_config_are_kept(source):
    source.generation_config.max_new_tokens = 3
    source.generation_config.eos_token_id = [1, 106]
    model = GemmaForCausalLM.from_transformers(source.bfloat16())
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == [1, 106]
    assert model.generate(torch.tensor([[2, 5]]), eos_token_id=[]).shape == (1, 5)


def test_other_models_are_refused(source):
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(num_key_value_heads=1, intermediate_size=8, **small)
    )
    refused(llama, "LlamaForCausalLM is not one of transformers' GemmaForCausalLM")
    refused(source.model, "Gemma3TextModel is not one of")
    source.config.use_bidirectional_attention = True
    refused(source, "Gemma3ForCausalLM: use_bidirectional_attention=True is not supported")


def test_a_head_of_its_own_is_shared_and_an_equal_one_is_tied(source):
    ids = torch.arange(3, 20)[None]
    head = nn.Parameter(source.lm_head.weight.detach().clone())
    source.lm_head.weight = head
    model = GemmaForCausalLM.from_transformers(source)
    assert model.lm_head is None
    close(model(ids).logits, source(ids).logits)
    head.data.neg_()
    model = GemmaForCausalLM.from_transformers(source)
    assert model.lm_head.data_ptr() == head.data_ptr()
    close(model(ids).logits, source(ids).logits)


def test_adapters_are_refused(source):
    projection = source.model.layers[0].self_attn.q_proj
    projection.lora_A = nn.Linear(48, 2, bias=False)
    refused(source, r"q_proj.lora_A.weight is not part.*merge_and_unload")

    class PeftModelForCausalLM(nn.Module):
        pass

    refused(
        PeftModelForCausalLM(), "PeftModelForCausalLM: adapters are not supported.*merge_and_un"
    )


class Quantized(nn.Parameter):
    """A subclass of Parameter, like Params4bit of bitsandbytes."""


def test_unsupported_weights_are_refused(source):
    layer = source.model.layers[1]
    changes = [
        (lambda p: Quantized(p.data), "q_proj.weight is a Quantized of torch.float32: quantized"),
        (lambda p: nn.Parameter(p.data.char(), requires_grad=False), "Parameter of torch.int8"),
        (lambda p: nn.Parameter(p.data.to("meta")), "q_proj.weight is on the meta device"),
        (lambda p: nn.Parameter(p.data.bfloat16()), "several dtypes.*bfloat16"),
        (lambda p: nn.Parameter(p.data[:4]), r"has shape \(4, 48\), but the config requires"),
    ]
    kept = layer.self_attn.q_proj.weight
    for change, message in changes:
        layer.self_attn.q_proj.weight = change(kept)
        refused(source, message)
    layer.self_attn.q_proj.weight = kept
    layer.mlp.up_proj.bias = nn.Parameter(torch.zeros(88))
    refused(source, "layers.1.mlp.up_proj.bias is not part of the config's model")
    layer.mlp.up_proj = nn.Identity()
    refused(source, "layers.1.mlp.up_proj.weight is missing")


def test_float16_is_refused_for_gemma_3(source):
    refused(source.half(), "overflows float16")


def test_source_model_is_unchanged(source):
    state = deepcopy(source.state_dict())
    model = GemmaForCausalLM.from_transformers(source)
    del model
    assert all(torch.equal(state[k], v) for k, v in source.state_dict().items())
    assert all(weight.requires_grad for weight in source.parameters())
