"""Checks options that people change on a loaded model, and keywords that they pass. The result is
transformers' own, or the call is refused with an error that names the alternative."""

import copy

import peft
import pytest
import torch
import transformers
from hf_models import logits, make, padded, prompt, why
from tiny_models import close
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask

from gemma_fast.hf import accelerate, accelerated, explain
from gemma_fast.hf import attention as hf_attention


def set_config(**values):
    def change(model):
        for name, value in values.items():
            setattr(model.config, name, value)

    return change


def set_attribute(kind, name, value):
    def change(model):
        for module in model.modules():
            if kind in type(module).__name__ and hasattr(module, name):
                setattr(module, name, copy.deepcopy(value))

    return change


def hook(kind, register, function):
    def change(model):
        for module in model.modules():
            if kind in type(module).__name__:
                getattr(module, register)(function)

    return change


KINDS = ["full_attention", "sliding_attention", "sliding_attention"]
CHANGES = {
    "the config's window": set_config(sliding_window=5),
    "the config's kinds of layers": set_config(layer_types=KINDS),
    "the config's activation": set_config(hidden_activation="gelu"),
    "the attention's window": set_attribute("Attention", "sliding_window", 3),
    "the attention's scaling": set_attribute("Attention", "scaling", 0.9),
    "the activation": set_attribute("MLP", "act_fn", nn.GELU()),
    "eps": set_attribute("RMSNorm", "eps", 0.5),
    "a hook on the activation": hook("GELUTanh", "register_forward_hook", lambda m, x, y: 2 * y),
    "a hook on a norm": hook("RMSNorm", "register_forward_hook", lambda m, x, y: 2 * y),
    "a pre-hook on an MLP": hook("MLP", "register_forward_pre_hook", lambda m, x: (2 * x[0],)),
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("order", ["changed", "accelerated"])
@pytest.mark.parametrize("change", CHANGES)
def test_change_has_the_same_effect_as_without_acceleration(change, order, attention):
    model, ids = make("gemma3-gqa", attention), prompt()
    theirs = copy.deepcopy(model)
    CHANGES[change](theirs)
    for act in (accelerate, CHANGES[change])[:: 1 if order == "accelerated" else -1]:
        act(model)
    for mask in (None, padded(ids, 7, 0)):
        real = slice(None) if mask is None else mask.bool()
        expected = logits(theirs, ids, mask)[real]
        close(logits(model, ids, mask)[real], expected)


def test_replaced_activation_is_noticed_after_a_with_block():
    model, ids = accelerate(make("gemma3-gqa")), prompt()
    CHANGES["the activation"](model)
    expected = logits(model, ids)
    with accelerated(model, norm=False):
        close(logits(model, ids), expected)
    close(logits(model, ids), expected)
    assert "act_fn was replaced after accelerate" in why(model)["mlp"][1]


def test_exact_gelu_in_the_config_is_not_replaced_by_the_tanh_approximation():
    config = copy.deepcopy(make("gemma3-gqa").config)
    config.hidden_activation = "gelu"
    model = transformers.Gemma3ForCausalLM(config).eval()
    expected = logits(model, prompt())
    close(logits(accelerate(model), prompt()), expected)
    assert "not the GELU's tanh approximation" in why(model)["mlp"][1]


@pytest.mark.parametrize("family", ["gemma-mqa", "gemma2-gqa", "gemma3-gqa"])
def test_bias_yarn_and_positions_are_honored(family):
    config = copy.deepcopy(make(family).config)
    config.attention_bias = True
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
            "original_max_position_embeddings": 16}  # fmt: skip
    if family == "gemma3-gqa":
        config.rope_parameters = dict.fromkeys(set(config.layer_types), yarn)
    else:
        config.rope_parameters = yarn
    config._attn_implementation = "eager"
    model, ids = type(make(family))(config).eval(), prompt()
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.data.normal_()
    positions = torch.arange(0, 60, 2).expand(2, 30) + 5  # gaps, and not from 0
    expected = logits(model, ids), logits(model, ids, position_ids=positions)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    accelerate(model, strict=True)
    close(logits(model, ids), expected[0])
    close(logits(model, ids, position_ids=positions), expected[1])


KEYWORDS = {
    "s_aux": torch.ones(4), "position_bias": torch.randn(1, 4, 30, 30),
    "cu_seq_lens_q": torch.tensor([0, 12, 30]), "is_causal": False,
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", KEYWORDS)
def test_keywords_of_attention_have_the_same_effect_as_without_acceleration(name, attention):
    model, given = make("gemma3-gqa", attention), {"input_ids": prompt(), name: KEYWORDS[name]}
    expected = model(**given).logits
    close(accelerate(model)(**given).logits, expected)
    path, reason = why(model, **given)["attention"]
    unknown = "hides more than causality" if name == "is_causal" else f"{name}: unknown keyword"
    assert path == "transformers" and unknown in reason


@pytest.mark.parametrize("order", ["changed", "accelerated"])
def test_attention_that_is_set_to_bidirectional_is_left_or_refused(order):
    """sdpa without a mask reads is_causal of the module, as in LLM2Vec."""
    model, ids = make("gemma3-gqa", "sdpa"), prompt(t=8)
    change = set_attribute("Attention", "is_causal", False)
    theirs = copy.deepcopy(model)
    change(theirs)
    assert (logits(theirs, ids) - logits(model, ids)).abs().max() > 0.1
    for act in (accelerate, change)[:: 1 if order == "accelerated" else -1]:
        act(model)
    if order == "accelerated":
        with pytest.raises(ValueError, match="is_causal=False, but the kernels do not"):
            logits(model, ids)
        accelerate(model)
    close(logits(model, ids), logits(theirs, ids))
    assert "bidirectional" in why(model)["attention"][1]


@torch.no_grad()
def test_what_flash_attention_honors_is_refused():
    """eager attention, which runs in its place, ignores packed sequences and sinks."""
    model = accelerate(make("gemma3-gqa"))
    layer = model.model.layers[0].self_attn
    bounds = torch.zeros(2, 1, 1, 1, dtype=torch.int32)
    q, k, v = torch.randn(1, 4, 5, 32), torch.randn(1, 2, 5, 32), torch.randn(1, 2, 5, 32)

    def call(**options):
        return hf_attention.attend("flash_attention_2", layer, q, k, v, bounds, 0.2, **options)[0]

    expected = call()
    assert torch.equal(call(position_ids=torch.arange(3, 8)[None]), expected)
    with pytest.raises(ValueError, match="flash_attention_2 honors position_ids that restart"):
        call(position_ids=torch.tensor([[0, 1, 2, 0, 1]]))
    with pytest.raises(ValueError, match=r"honors s_aux, .* call accelerate\(.*=False"):
        call(s_aux=torch.ones(4))


@torch.no_grad()
def test_block_mask_is_refused():
    model = make("gemma3-gqa")
    model.config._attn_implementation = "flex_attention"
    causal = create_block_mask(lambda b, h, q, k: q >= k, 2, None, 30, 30, device="cpu")
    masks = dict.fromkeys(("full_attention", "sliding_attention"), causal)
    with pytest.raises(ValueError, match=r"mask is a BlockMask, .* accelerate\(model, attention="):
        accelerate(model)(prompt(), attention_mask=masks)


@pytest.mark.parametrize("norms", [torch.float32, torch.bfloat16])
def test_norms_in_another_dtype_give_the_same_logits(norms):
    """peft's prepare_model_for_kbit_training keeps norms in float32."""
    model, ids = make("gemma3-gqa"), prompt()
    exact = logits(model, ids)
    model.bfloat16()
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.to(norms)
    theirs = (logits(model, ids) - exact).square().mean().sqrt()
    ours = (logits(accelerate(model), ids) - exact).square().mean().sqrt()
    assert ours < 1.1 * theirs and {path for path, _ in why(model).values()} == {"reference"}


def test_norm_with_a_tensor_subclass_stays():
    """FSDP2 and tensor parallelism store weights as DTensors."""
    model = make("gemma3-gqa")

    class DTensor(nn.Parameter): ...

    norm = model.model.norm
    norm.weight = DTensor(norm.weight.data)
    expected = logits(model, prompt())
    close(logits(accelerate(model), prompt()), expected)
    left = [line for line in explain(model) if line.path == "transformers"]
    assert [line.why for line in left] == ["its weight is a DTensor, not a plain tensor"]


ADAPTERS = {
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "LN tuning": lambda: peft.LNTuningConfig(
        target_modules=["input_layernorm", "q_norm"], task_type="CAUSAL_LM"
    ),
    "modules to save": lambda: peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["mlp", "input_layernorm"]
    ),
    "DoRA": lambda: peft.LoraConfig(target_modules=["q_proj", "up_proj"], use_dora=True),
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("order", ["adapted", "accelerated"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_give_the_same_logits(kind, order):
    ids, model = prompt(), make("gemma3-gqa")
    torch.manual_seed(0)
    theirs = peft.get_peft_model(copy.deepcopy(model), ADAPTERS[kind]()).eval()
    if order == "accelerated":
        accelerate(model)
    torch.manual_seed(0)
    ours = peft.get_peft_model(model, ADAPTERS[kind]()).eval()
    for adapted in (theirs, ours):
        generator = torch.Generator().manual_seed(5)
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    if order == "adapted":
        accelerate(ours)
    mask = padded(ids, 7, 0)
    found, expected = logits(ours, ids, mask), logits(theirs, ids, mask)
    real = mask.bool()
    if found.shape[1] > real.shape[1]:
        found, expected = found[:, -real.shape[1] :], expected[:, -real.shape[1] :]
    close(found[real], expected[real])
    assert any(getattr(x, "run", None) is not None for x in ours.modules())
